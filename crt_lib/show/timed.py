"""Blocks about measured time and memory: training steps, their parts and sizes, and decoding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crt_lib.bench.exits import MIX
from crt_lib.exits.policy import CRITERIA
from crt_lib.show.markdown import cells, render

CASE = {"step": "step", "case": "ours in", "isa": "ISA", "threads": "threads"}


def training_benchmark(results: Path) -> str:
    """`crt bench train`: the released-style step against ours, then where ours spends its time."""
    rows = _cases(results / "bench" / "train.csv")
    released, ours = (rows[rows["side"] == side].itertuples() for side in ("released", "ours"))
    parts = _cases(results / "bench" / "train_parts.csv")
    beyond = (parts["of_bound"] > 1).any()
    pairs = list(zip(released, ours, strict=True))
    return render("bench", pairs=pairs, parts=_parts(parts), beyond=beyond)


def _cases(path: Path) -> pd.DataFrame:
    """A table of steps, with the `step` of each row in words."""
    rows = pd.read_csv(path)
    return rows.assign(step=rows["rows"].astype(str) + " x " + rows["seq_len"].astype(str))


def _parts(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a case, a column a part: its share of the step, and of its bound."""
    rows["cell"] = cells(rows["share"], "{:.0%}") + cells(rows["of_bound"], " ({:.0%})")
    case = list(CASE)
    made = rows.pivot(index=case, columns="part", values="cell")[rows["part"].unique()]
    most = rows.loc[rows.groupby(case)["share_of_lost"].idxmax()].set_index(case)
    made["most lost in"] = most["part"] + cells(most["share_of_lost"], ", {:.0%}")
    return made.reset_index().rename(columns=CASE)


def cost_against_size(results: Path) -> str:
    """`crt bench cost`: tokens/s and peak memory, a row a size, a column a number of threads."""
    processors = []
    for folder in _processors(results):
        rows = pd.read_csv(folder / "cost.csv").set_index(["batch", "length", "loops", "d"])
        columns = {}
        for threads in rows["threads"].unique():
            own = rows[rows["threads"] == threads]
            many = "1 thread" if threads == 1 else f"{threads} threads"
            columns[f"tokens/s, {many}"] = cells(own["tokens_per_second"], "{:.0f}")
            columns[f"peak GB, {many}"] = cells(own["peak_memory_bytes"], "{:.2f}", 1e9)
        processors.append((rows.iloc[0], pd.concat(columns, axis=1).reset_index()))
    return render("cost", processors=processors)


def _processors(results: Path) -> tuple[Path, Path]:
    """The folders of measurements with all of the processor, and with its AVX2 alone."""
    return results / "bench", results / "bench" / "avx2"


def costliest_operations(results: Path) -> str:
    """`crt bench step`: where a training step of `crt2` spends its time, and what was saved."""
    paths = pd.read_csv(results / "bench" / "step.csv")
    return render(
        "step",
        paths=paths,
        machine=_where(paths.iloc[0]),
        costs=pd.read_csv(results / "bench" / "step_costs.csv"),
        processors=[pd.read_csv(own / "step_updates.csv") for own in _processors(results)],
    )


def _where(row: pd.Series) -> str:
    """The machine and precision of a measured row."""
    return f"{row['device']}, {row['isa']}, {row['threads']} threads, {row['precision']}"


def decoding(results: Path) -> str:
    """`crt bench decode` on `crt2` at small: a row a way, speed for each batch size.

    Then policies on the tokens that they are timed on, how near full depth comes to reading its
    weights, and what 8 bits lose.
    """
    rows = pd.read_csv(results / "small" / "crt2" / "decode.csv")
    ways = rows.drop_duplicates("way").set_index("way", drop=False)
    fixed = [way for way in CRITERIA if way in ways.index and pd.isna(ways["tau"][way])]
    shown = ways.drop(fixed)
    made = shown[["way"]].rename(columns={"way": "decoding"})
    made["mean loops"] = cells(shown["mean_loops"], "{:.2f}")
    made["multiply-adds"] = cells(shown["multiply_adds"], "{:.2f}M", 1e6)
    made["test PPL"] = cells(shown["token_ppl"], "{:.2f}")
    for batch, own in rows.set_index("way").groupby("batch"):
        speeds = cells(own["tokens_per_second"], "{:.0f}") + cells(own["speedup"], " ({:.2f}x)")
        made[f"tokens/s, {batch} at a time"] = speeds
    both = pd.concat([rows, pd.read_csv(results / "bench" / "avx2" / "decode.csv")])
    lost = pd.read_csv(results / "bench" / "quantize.csv")
    return render(
        "decode",
        ways=made,
        fixed=fixed,
        first=ways.loc["full depth"],
        machine=_where(ways.loc["full depth"]),
        without_cache=ways["rounds"]["no cache"],
        taken=taken([results / "small" / "crt2" / "taken.csv"]),
        full=both[both["way"] == "full depth"],
        quantized=lost[lost["exit"] == lost["exit"].max()],
    )


def taken(files: Sequence[Path]) -> str:
    """`crt bench exits`: loss and speed of policies on the same tokens, a table for each file."""
    return render("taken", files=[_taken(file) for file in files])


def _taken(file: Path) -> dict[str, Any]:
    rows = pd.read_csv(file)
    rows = rows[~rows["policy"].str.startswith(MIX)]
    above, low, high = (cells(np.expm1(rows[of]), "{:+.2%}") for of in ("above", "low", "high"))
    rows["PPL"] = above + " [" + low + ", " + high + "]"
    beside = cells(rows["over_fixed"], " ({:.2f}x of fixed")
    beside += cells(rows["over_mix"], ", {:.2f}x of mix") + ")"
    rows["speed"] = cells(rows["speedup"], "{:.2f}x") + beside.where(rows["asks"] > 0, "")
    last = rows.sort_values("rows").drop_duplicates("policy", keep="last")
    last = last.set_index("policy", drop=False)
    made = last[["policy"]].assign(**{"mean loops": cells(last["mean_loops"], "{:.2f}")})
    made[f"PPL, {rows['rows'].max()} at a time"] = last["PPL"]
    for count, own in rows.groupby("rows"):
        made[f"speed, {count} at a time"] = own.set_index("policy")["speed"]
    tokens = [f"{n:,}" for n in rows.drop_duplicates("rows")["tokens"]]
    return {"policies": made, "tokens": tokens, "machine": _where(rows.iloc[0])}
