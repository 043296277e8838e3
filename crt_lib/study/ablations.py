"""Ablations: with and without the leak, the variants of Table 3, and what a change is worth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crt_lib.files import InputError, locked
from crt_lib.runs.profiles import Profile
from crt_lib.study.ladder import FAMILIES, LADDER
from crt_lib.study.search import summarise
from crt_lib.text.tokenizer import TokenizedCorpus
from crt_lib.train import TrainResult, train

PAPER_TABLE_3 = {  # TRM cycle -> validation loss, 3 loops; `conv` is the paper's "Pure Conv TRM"
    "linear": 3.4080,
    "conv": 1.8815,
    "conv_linear": 1.6986,
    "depthwise": 2.1312,
}
NO_VERDICT, BROKE = "not tuned alike: no verdict", "the training broke"
ONE_SEED, NOISE = "one seed", "no larger than the noise"
BUDGET = "150 updates"  # of the stored ablations
RATES = {"paper": 1e-3, "crt2": 1.6e-2, "released": 4e-3}  # tuned for these at that budget


def train_both(
    profile: Profile, data: TokenizedCorpus, name: str, out: Path, *, fresh: bool = False
) -> dict[str, TrainResult]:
    """`profile` trained twice, alike but for the convolutions' padding: "symmetric" and "causal".

    In `out`/`name`, whose lock it waits for; a training that is there is not made again unless
    `fresh`.
    """
    made = {}
    config = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    how: dict[str, Any] = {"resume": not fresh, "progress": False}
    with locked(out / name):
        for kind in ("symmetric", "causal"):
            own = config.replace(causal=kind == "causal")
            made[kind] = train(own, profile.train, data, out / name / kind, **how)
    return made


def searched_table_3(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a variant of Table 3: the paper's loss, and ours of `search.search`, means over seeds.

    Each arm is at the rate tuned for it (`summarise`), of those that were tried (`rates`: how many,
    by recipe). Variants without rows of all three recipes are left out.
    """
    table = []
    for variant, paper in {**PAPER_TABLE_3, "depthwise_mlp": None}.items():
        names = [f"{recipe}, TRM {variant}" for recipe in RATES]
        found = dict(zip(RATES, summarise(rows, names, BUDGET), strict=False))
        if len(found) < len(RATES):
            continue
        seen = found["released"]["exit_losses"]
        table.append(
            {
                "variant": variant,
                "paper": paper,
                "symmetric": seen[max(seen)],
                "deployable": found["released"]["loss"],
                "causal": found["paper"]["loss"],
                "crt2": found["crt2"]["loss"],
                "seeds": min(row["seeds"] for row in found.values()),
                "rates": " ".join(f"{recipe}:{row['rates']}" for recipe, row in found.items()),
            }
        )
    return table


def worth(
    rows: Sequence[Mapping[str, Any]], base: str, changes: Sequence[str]
) -> list[dict[str, Any]]:
    """What each change adds to the loss of `base`, with its 95 % interval.

    `rows`: of `search.search`; `changes` are arms, as is `base`. Each arm is at the rate tuned for
    it, `max_lr` of `rates` that were tried (`summarise`); `alike` says whether it and `base` both
    have a worse rate on either side, without which a difference may be the rate's; or the one that
    has not is ahead all the same, and more rates could only bring it further. `adds` is the
    mean over the seeds that both have, `seeds` of them; its interval is Student's t of the
    differences seed by seed, so that no arm's spread counts for another. With one seed there is no
    interval: `low` and `high` are None. Changes without rows are left out; raises InputError when
    `base` has none.
    """
    tuned = {row["arm"]: row for row in summarise(rows, (base, *changes), BUDGET)}
    if base not in tuned:
        raise InputError(f"no rows of {base}; `crt search`")
    start, table = tuned[base], []
    for arm, best in tuned.items():
        seeds = sorted(start["losses"].keys() & best["losses"])
        if not seeds:
            continue
        losses, before = (np.array([of["losses"][seed] for seed in seeds]) for of in (best, start))
        row = {name: best[name] for name in ("arm", "parameters", "rates", "max_lr")}
        row |= {"seeds": len(seeds), "loss": float(losses.mean())}
        if arm != base:
            row |= _interval(losses - before)
            sure = row["low"] is not None
            ahead = sure and row["high"] < 0, sure and row["low"] > 0
            row["alike"] = (best["edge"], start["edge"]) in ((False, False), ahead)
        table.append(row)
    return table


def taken_back(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What `crt2` loses in nats per token without each change of the ladder (`adds`), most first.

    Each at the best rate tried for it with the first seed, over the `seeds` that both have.
    """
    _, *lost = worth(rows, "crt2", [f"without {name}" for name in LADDER])
    made = pd.DataFrame(lost).set_index("arm")[["adds", "seeds"]]
    made.index = made.index.str.removeprefix("without ")
    return made.sort_values("adds", ascending=False)


def tried(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many trainings of a search were of `crt2` and how many of each it is held against."""
    begins = pd.Series([row["arm"] for row in rows]).str.extract(f"^({'|'.join(FAMILIES)})")[0]
    counts = begins.map(FAMILIES).fillna("`crt2`, its rungs and variants").value_counts()
    return ", ".join(f"{count} of {whose}" for whose, count in counts.items())


def _interval(added: np.ndarray) -> dict[str, float | None]:
    """Their mean and, of two or more, its 95 % interval."""
    mean = float(added.mean())
    if len(added) < 2 or not math.isfinite(mean):
        return {"adds": mean, "low": None, "high": None}
    half = float(added.std(ddof=1)) / math.sqrt(len(added)) * _quantile(len(added) - 1)
    return {"adds": mean, "low": mean - half, "high": mean + half}


@cache
def _quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from a large fixed sample."""
    return float(np.quantile(np.random.default_rng(0).standard_t(freedom, 1_000_000), 0.975))


def finding(row: Mapping[str, Any]) -> str:
    """What a row of `worth` shows: none where the two were not tuned alike, or one seed ran."""
    if not row["alike"]:
        return NO_VERDICT
    if not math.isfinite(row["loss"]):
        return BROKE
    if row["low"] is None:
        return ONE_SEED
    if row["low"] <= 0 <= row["high"]:
        return NOISE
    return "better" if row["adds"] < 0 else "worse"


def in_words(row: Mapping[str, Any]) -> str:
    """A row of `worth` in words."""
    if not math.isfinite(row["loss"]):
        return f"{row['arm']}: {BROKE}"
    return f"{row['arm']}: {row['adds']:+.3f}, {finding(row)}"
