"""`crt bench drafts`: what speculation keeps by position, what drafts cost, and the bound."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from crt_lib.bench.ways import Way, ratio, speculated, timed
from crt_lib.exits.decode import Sampling, generate
from crt_lib.exits.speculate import LONGEST, Speculated, Speculation
from crt_lib.files import InputError
from crt_lib.runs.machine import measured_on

if TYPE_CHECKING:
    from crt_lib.model import CRT

POSITIONS = 8  # of a draft, that have a column
WARM_UP = 16  # tokens
FEWEST = LONGEST + 2  # new ones: a text then takes more than one verification

Rows = list[dict[str, Any]]


def bench_drafts(
    model: "CRT",
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
) -> Rows:
    """A row a temperature and way to draft: `new_tokens` more of each prompt, full depth in turn.

    `draft_loop` 0: the text so far drafts, for the last loop and for the exits before (`last`).
    `kept_1`, `kept_2`, ...: the share of the drafted tokens there that are kept, of those whose
    predecessors were. `tokens`: new ones a verification. Its seconds are fitted by least squares:
    `ms_verify`, and `ms_draft` for each drafted token, verified too; `ms_verify` alone where all
    drafts are alike. `predicted`: the speed against full depth (`ms_full` a token) that follows,
    `bound`: if the longest drafts, of LONGEST where they vary, were always kept.
    `speedup`: full depth's seconds for as many tokens by the way's; from ten prompts on `low` and
    `high`, its 95 % interval over them.
    Raises InputError for too few prompts or tokens.
    """
    if len(prompts) < 2 or new_tokens < FEWEST:
        raise InputError(
            f"{len(prompts)} prompts, {new_tokens} tokens: at least 2 and {FEWEST} are timed"
        )
    rows: Rows = []
    final, exits = model.config.n_loops, model.config.exit_loops
    for temperature in temperatures:
        how: dict[str, Any] = {"sampling": Sampling(temperature)}
        ways: dict[tuple[int, int] | None, Way] = {None: partial(generate, model, **how)}
        for loop, last in [(0, k) for k in (final, *exits)] + [(k, final) for k in exits]:
            draft = Speculation(model, loop, last)
            ways[loop, last] = partial(speculated, draft, **how)
        for way in ways.values():
            timed(way, prompts[:1], WARM_UP)
        # of each text: what was made, and the seconds of each step but the first
        found: dict[Any, list[tuple[Any, np.ndarray]]] = {of: [] for of in ways}
        for prompt in tqdm(prompts, f"temperature {temperature:g}", disable=None):
            for of, way in ways.items():
                (made,), seconds, _ = timed(way, [prompt], new_tokens)
                found[of].append((made, seconds[1:]))
        full = np.array([seconds.mean() for _, seconds in found.pop(None)])  # of a token
        for (loop, last), own in found.items():
            shape = {"draft_loop": loop, "last": last, "temperature": temperature}
            shape["texts"] = len(prompts)
            rows.append(shape | {"new_tokens": new_tokens} | _row(own, full) | measured_on())
    return rows


def _row(timed: Sequence[tuple[Speculated, np.ndarray]], full: np.ndarray) -> dict[str, Any]:
    verified = [made.verified for made, _ in timed]
    drafted, kept = np.array([one for of in verified for one in of]).T
    by_position = {}
    for at in range(POSITIONS):
        reached = (drafted > at) & (kept >= at)
        share = float((kept[reached] > at).mean()) if reached.any() else None
        by_position[f"kept_{at + 1}"] = share
    later = np.array([one for of in verified for one in of[1:]])  # the first is timed with a prompt
    seconds = np.concatenate([of for _, of in timed])
    sizes, most, draft = later[:, 0], LONGEST, 0.0
    if np.median(sizes) < sizes.max():
        fit = np.stack([np.ones(len(sizes)), sizes], 1)
        verify, draft = np.linalg.lstsq(fit, seconds, rcond=None)[0]
    else:  # all are alike, but for ends of texts
        most, verify = int(sizes.max()), seconds[sizes == sizes.max()].mean()
    new = np.array([sum(kept + 1 for _, kept in of[1:]) for of in verified])
    own = np.array([of.sum() for _, of in timed])
    against = map(float, ratio(full * new, own))
    tokens, full_s = float((later[:, 1] + 1).mean()), full.mean()
    return {
        "accepted": float(kept.sum() / max(drafted.sum(), 1)),
        **by_position,
        "tokens": tokens,
        **{"ms_full": 1e3 * full_s, "ms_verify": 1e3 * verify, "ms_draft": 1e3 * draft or None},
        "predicted": full_s * tokens / (verify + draft * sizes.mean()),
        "bound": full_s * (most + 1) / (verify + draft * most),
        **dict(zip(("speedup", "low", "high"), against, strict=False)),
    }
