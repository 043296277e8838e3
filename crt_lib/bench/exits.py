"""`crt bench exits`: policies timed on the tokens that they are scored on, one token at a time.

A text is read as it would be written: with caches, a token a step, but the next token is always
the text's own. So a policy's seconds and its perplexity are of the same tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crt_lib.audit.accounting import multiply_adds
from crt_lib.audit.compare import by_document
from crt_lib.bench.reading import Reader, Reading, Told, first_as_good, mixed
from crt_lib.bench.ways import FEWEST, FULL, asks_of, in_turn, latencies, ratio
from crt_lib.exits.scoring import windows_of
from crt_lib.files import InputError
from crt_lib.runs.machine import measured_on

if TYPE_CHECKING:
    from crt_lib.exits.policy import Policy
    from crt_lib.model import CRT

ORACLE = "oracle"
MIX = "random mix for "  # before the name of the policy whose mean depth it has
WARM_UP = 16  # steps
SAME = 5e-4  # nats a token, that is 0.05 % PPL: two policies so near lose the same

Rows = list[dict[str, Any]]


def bench_exits(
    model: "CRT",
    ids: np.ndarray,
    eot_id: int,
    policies: Mapping[str, "Policy"],
    *,
    seq_len: int,
    rows: int = 1,
    groups: int = FEWEST,
    seed: int = 0,
) -> Rows:
    """A row a policy, `rows` texts at a time: loss, depth and time on the same tokens of `ids`.

    `groups` of `rows` windows of `seq_len` are read by every policy in turn, two equal ones once.
    For each that asks there is a mix of two neighbouring fixed exits of the same mean depth, drawn
    by chance; and ORACLE, the first exit no worse than the last (of a trace: first that is right).

    `above`: nats a token above full depth, with its 95 % interval over windows, `low` and `high`.
    `ms`, `ms_p5`, `ms_p95`: the wait for a step; `first_ms`: for the first of a text. `speedup`:
    full depth's seconds by the policy's. `fixed`: the fastest fixed exit that is no worse (but for
    SAME); `over_fixed`, `over_mix`: its seconds and those of the mix by the policy's. Each has its
    95 % interval over groups (`speedup_low`, ...), from FEWEST of them on: both read the same ones.
    """
    known: dict[str, Policy] = {}
    for name, policy in {FULL: policies[FULL], **policies}.items():
        if policy not in known.values():  # or it would be timed twice
            known[name] = policy
    found: dict[str, list[Reading]] = {}
    reader, rng = Reader(model, rows, seq_len), np.random.default_rng(seed)
    texts = _groups(model, ids, eot_id, seq_len, rows, groups)
    inputs, targets = (of[:, :WARM_UP] for of in texts[0])
    reader.read(inputs, targets, known[FULL])
    turns = in_turn([*known], groups)
    for inputs, targets in tqdm(texts, f"{rows} at a time", disable=None):
        for name in next(turns):
            found.setdefault(name, []).append(reader.read(inputs, targets, known[name]))
        told = {ORACLE: first_as_good(model, inputs, targets)}
        for name in (name for name, policy in known.items() if policy.asks):
            depth = found[name][-1].loops.mean()
            told[MIX + name] = mixed(model.config.head_loops, depth, inputs.shape, rng)
        for name, loops in told.items():
            read = reader.read(inputs, targets, Told(loops=loops.to(inputs.device)))
            found.setdefault(name, []).append(read)
    shape: dict[str, Any] = {"rows": rows, "tokens": rows * groups * seq_len, "seq_len": seq_len}
    shape["precision"] = str(model.loop_encoding.dtype).removeprefix("torch.")
    made = [{"policy": name, **shape, **_columns(of, found[FULL])} for name, of in found.items()]
    for row in made:
        row |= _costs(model, known.get(row["policy"], known[FULL]), found[row["policy"]], seq_len)
    seconds = {n: np.array([one.seconds[1:].sum() for one in of]) for n, of in found.items()}
    return [row | _speeds(row, made, seconds) | measured_on() for row in made]


def _groups(
    model: "CRT", ids: np.ndarray, eot_id: int, seq_len: int, rows: int, groups: int
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets (rows, seq_len), of whole windows."""
    ids = ids[: rows * groups * seq_len]
    if len(ids) < rows * groups * seq_len:
        raise InputError(
            f"{rows * groups} windows of {seq_len} tokens were asked for, the text has {len(ids)}; "
            "ask for fewer"
        )
    pairs = windows_of(model, ids, eot_id, seq_len)
    inputs, targets = (torch.cat(of).split(rows) for of in zip(*pairs, strict=True))
    return list(zip(inputs, targets, strict=True))


def _columns(found: Sequence[Reading], full: Sequence[Reading]) -> dict[str, Any]:
    nats = np.concatenate([one.nats for one in found])  # (windows, T)
    above = nats - np.concatenate([one.nats for one in full])
    owner = np.repeat(np.arange(len(above)), above.shape[1])
    (interval,) = by_document(owner, above.reshape(-1, 1))
    waits = np.stack([one.seconds for one in found])
    return {
        "loss": float(nats.mean()),
        **{"above": interval.mean, "low": interval.low, "high": interval.high},
        "mean_loops": float(np.mean([one.loops.mean() for one in found])),
        **latencies(waits),
        "tokens_per_second": len(found[0].nats) / float(waits[:, 1:].mean()),
    }


def _costs(
    model: "CRT", policy: "Policy", found: Sequence[Reading], seq_len: int
) -> dict[str, float]:
    """Multiply-adds and vocabulary heads a token; what is told needs only the head it leaves by."""
    loops = np.concatenate([one.loops.ravel() for one in found])
    heads, asks = asks_of(model, policy, loops.tolist())
    of = {k: multiply_adds(model.config, seq_len, (k,)) for k in model.config.head_loops}
    without = {k: sum(parts.values()) - parts["heads"] for k, parts in of.items()}
    spent = np.mean([without[k] for k in loops.tolist()]) + heads * of[loops[0]]["heads"]
    return {"multiply_adds": float(spent), "heads": heads, "asks": asks}


def _speeds(
    row: Mapping[str, Any], rows: Rows, seconds: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """How much faster than full depth, the fastest fixed exit that is no worse, and the mix."""
    fixed = [
        own["policy"]
        for own in rows
        if (own["policy"] == FULL or own["policy"].startswith("exit "))
        if own["loss"] <= row["loss"] + SAME
    ]
    least = min(fixed, key=lambda name: seconds[name].sum(), default=None)
    against = {"speedup": FULL, "over_fixed": least, "over_mix": MIX + row["policy"]}
    made: dict[str, Any] = {"fixed": least}
    for name, other in against.items():
        found = ratio(seconds[other], seconds[row["policy"]]) if other in seconds else []
        keys = (name, f"{name}_low", f"{name}_high")
        made |= dict(zip_longest(keys, found))
    return made
