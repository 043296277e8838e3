"""Ablations: with and without the leak, the variants of Table 3, and what a change is worth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from crt_lib.audit.protocols import evaluate_deployable
from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile
from crt_lib.study.search import exit_losses
from crt_lib.text.tokenizer import TokenizedCorpus
from crt_lib.train import TrainResult, train

PAPER_TABLE_3 = {  # TRM cycle -> validation loss, 3 loops; `conv` is the paper's "Pure Conv TRM"
    "linear": 3.4080,
    "conv": 1.8815,
    "conv_linear": 1.6986,
    "depthwise": 2.1312,
}


def train_both(
    profile: Profile, data: TokenizedCorpus, name: str, out: Path, *, fresh: bool = False
) -> dict[str, TrainResult]:
    """`profile` trained twice, alike but for the convolutions' padding: "symmetric" and "causal".

    In `out`/`name`; a training that is there is not made again unless `fresh`.
    """
    made = {}
    for kind, causal in (("symmetric", False), ("causal", True)):
        vocabulary = data.tokenizer.vocab_size
        config = profile.model.replace(vocab_size=vocabulary, causal=causal)
        folder = out / name / kind
        made[kind] = train(config, profile.train, data, folder, resume=not fresh, progress=False)
    return made


def table_3(
    profile: Profile, data: TokenizedCorpus, out: Path, *, fresh: bool = False
) -> list[dict[str, Any]]:
    """A row a variant of Table 3: the paper's loss, and ours with and without the leak.

    `symmetric` and `causal`: nats a token on the first `eval_tokens` of valid, last exit.
    `deployable`: of the symmetric model when nothing after a token is in its input; for the causal
    one that is `causal`.
    """
    rows = []
    eot = data.tokenizer.eot_id
    for variant, paper in PAPER_TABLE_3.items():
        own = profile.replace(model=profile.model.replace(trm=variant))
        row: dict[str, Any] = {"variant": variant, "paper": paper}
        for kind, made in train_both(own, data, f"table_3/{variant}", out, fresh=fresh).items():
            row[kind] = made.metrics[-1][f"valid_loss_{own.model.n_loops}"]
            if kind == "symmetric":
                alone = evaluate_deployable(made.model, data.valid.ids, eot)
                row["deployable"] = alone.loss[own.model.n_loops]
        rows.append({**row, "seed": profile.train.seed, "updates": profile.train.updates})
    return rows


BUDGET = "150 updates"  # of the stored ablations
RATES = {"paper": 1e-3, "crt2": 1.6e-2, "released": 4e-3}  # tuned for these at that budget


def searched_table_3(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`table_3` from rows of `search.search`: means over the seeds, and crt2 besides.

    Each arm is at the rate where it has the lowest loss with seed 0, of those that were tried
    (`rates`: how many, by recipe). Variants without rows of all three recipes are left out.
    """
    rows = list(rows)
    table = []
    for variant, paper in {**PAPER_TABLE_3, "depthwise_mlp": None}.items():
        of = {name: _at_best_rate(rows, f"{name}, TRM {variant}") for name in RATES}
        if not all(of.values()):
            continue
        causal, crt2, released = (of[name] for name in RATES)
        seen = [exit_losses(row) for row in released]
        table.append(
            {
                "variant": variant,
                "paper": paper,
                "symmetric": _mean(losses[max(losses)] for losses in seen),
                "deployable": _mean(row["valid_loss"] for row in released),
                "causal": _mean(row["valid_loss"] for row in causal),
                "crt2": _mean(row["valid_loss"] for row in crt2),
                "seeds": min(len(mine) for mine in of.values()),
                "rates": " ".join(
                    f"{name}:{_rates(rows, f'{name}, TRM {variant}')}" for name in of
                ),
            }
        )
    return table


def worth(
    rows: Iterable[Mapping[str, Any]], recipe: str, base: str, changes: Sequence[str]
) -> list[dict[str, Any]]:
    """What each change of `recipe` adds to the loss of `base`, with its 95 % interval.

    `rows`: of `search.search`; `changes` are arms, as is `base`. `adds` is the mean over the seeds
    that both have, `seeds` of them; its interval is Student's t of the differences seed by seed, so
    that no arm's spread counts for another. With one seed there is no interval: `low` and `high`
    are None. Changes without rows are left out; raises InputError when `base` has none.
    """
    rows = list(rows)
    own = _by_seed(rows, recipe, base)
    if not own:
        raise InputError(f"no rows of {base}; `crt search`")
    table: list[dict[str, Any]] = []
    for arm in (base, *changes):
        mine = _by_seed(rows, recipe, arm)
        shared = sorted(own.keys() & mine.keys())
        if not shared:
            continue
        losses = [mine[seed]["valid_loss"] for seed in shared]
        row = {"arm": arm, "parameters": mine[shared[0]]["parameters"], "seeds": len(shared)}
        row["loss"] = _mean(losses)
        if arm != base:
            row |= _paired(losses, [own[seed]["valid_loss"] for seed in shared])
        table.append(row)
    return table


def _paired(losses: Sequence[float], base: Sequence[float]) -> dict[str, float | None]:
    added = np.array(losses) - np.array(base)
    mean, low, high = float(added.mean()), None, None
    if len(added) > 1 and np.isfinite(added).all():
        spread = float(added.std(ddof=1)) / math.sqrt(len(added)) * _quantile(len(added) - 1)
        low, high = mean - spread, mean + spread
    return {"adds": mean, "low": low, "high": high}


@cache
def _quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from a large fixed sample."""
    return float(np.quantile(np.random.default_rng(0).standard_t(freedom, 1_000_000), 0.975))


def in_words(row: Mapping[str, Any]) -> str:
    """A row of `worth` in words."""
    if not math.isfinite(row["loss"]):
        return f"{row['arm']}: the training broke"
    if row["low"] is None:
        return f"{row['arm']}: {row['adds']:+.3f}, one seed"
    if row["low"] <= 0 <= row["high"]:
        return f"{row['arm']}: {row['adds']:+.3f}, no larger than the noise"
    return f"{row['arm']}: {row['adds']:+.3f}, {'worse' if row['adds'] > 0 else 'better'}"


def _by_seed(
    rows: Sequence[Mapping[str, Any]], recipe: str, arm: str
) -> dict[int, Mapping[str, Any]]:
    return {row["seed"]: row for row in _of_arm(rows, recipe, arm)}


def _of_arms(rows: Sequence[Mapping[str, Any]], recipe: str) -> list[Mapping[str, Any]]:
    """The rows of all arms of a recipe at its rate."""
    own = [row for row in rows if row["arm"].split(",")[0] == recipe]
    return [row for row in own if (row["budget"], row["max_lr"]) == (BUDGET, RATES[recipe])]


def _at_best_rate(rows: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    own = [row for row in rows if (row["arm"], row["budget"]) == (arm, BUDGET)]
    first = [row for row in own if row["seed"] == 0]
    if not first:
        return []
    best = min(first, key=lambda row: row["valid_loss"])["max_lr"]
    return [row for row in own if row["max_lr"] == best]


def _rates(rows: Sequence[Mapping[str, Any]], arm: str) -> int:
    tried = (row for row in rows if (row["arm"], row["budget"]) == (arm, BUDGET))
    return len({row["max_lr"] for row in tried})


def _of_arm(rows: Sequence[Mapping[str, Any]], recipe: str, arm: str) -> list[Mapping[str, Any]]:
    return [row for row in _of_arms(rows, recipe) if row["arm"] == arm]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
