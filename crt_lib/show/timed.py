"""Tables of measured time and memory: training steps, their parts and sizes, and decoding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from crt_lib.bench.exits import MIX
from crt_lib.exits.policy import CRITERIA
from crt_lib.show.markdown import cells, table

CASE = {"step": "step", "case": "ours in", "isa": "ISA", "threads": "threads"}


def training_benchmark(results: Path) -> str:
    """`crt bench train`: the released-style step against ours, then where ours spends its time."""
    rows = _cases(results / "bench" / "train.csv")
    released, ours = (rows[rows["side"] == side].reset_index() for side in ("released", "ours"))
    made = ours[list(CASE)].rename(columns=CASE)
    columns = {  # -> head, unit, format
        "useful_tokens_per_second": ("useful tokens/s", 1, "{:.1f}"),
        "peak_memory_bytes": ("peak GB", 1e9, "{:.2f}"),
        "mfu": ("MFU", 0.01, "{:.0f} %"),
    }
    for column, (head, unit, form) in columns.items():
        before, after = (cells(side[column] / unit, form) for side in (released, ours))
        made[head] = before + " -> " + after
        if column != "mfu":
            ratio = cells(ours[column] / released[column], "{:.2f}x")
            made.insert(made.shape[1], "ratio", ratio, allow_duplicates=True)
    said = f"Released-style in fp32 -> ours, {rows['device'][0]}. MFU: of the precision's own peak."
    return f"{table(made)}\n\n{said}\n\n{_parts(results)}"


def _cases(path: Path) -> pd.DataFrame:
    """A table of steps, with the `step` of each row in words."""
    rows = pd.read_csv(path)
    return rows.assign(step=rows["rows"].astype(str) + " x " + rows["seq_len"].astype(str))


def _parts(results: Path) -> str:
    """A row a case of train_parts.csv, a column a part: its share of the step, and of its bound."""
    rows = _cases(results / "bench" / "train_parts.csv")
    rows["cell"] = cells(rows["share"], "{:.0%}") + cells(rows["of_bound"], " ({:.0%})")
    case = list(CASE)
    made = rows.pivot(index=case, columns="part", values="cell")[rows["part"].unique()]
    most = rows.loc[rows.groupby(case)["share_of_lost"].idxmax()].set_index(case)
    made["most lost in"] = most["part"] + cells(most["share_of_lost"], ", {:.0%}")
    said = (
        "Our step by part: the share of its time, and in brackets how much of the part's bound is "
        "reached: its multiply-adds, recomputation apart, at the peak; for the optimiser and the "
        "depthwise taps their bytes at the memory's bandwidth. Last, the part that loses most, and "
        "its share of all that is lost."
    )
    if (rows["of_bound"] > 1).any():
        said += (
            " No part can beat a true bound: above 100 % the bandwidth, measured by itself and "
            "noisily, came out too low."
        )
    return f"{said}\n\n{table(made.reset_index().rename(columns=CASE))}"


def cost_against_size(results: Path) -> str:
    """`crt bench cost`: tokens/s and peak memory, a row a size, a column a number of threads."""
    said = ["An update of `crt2` at the size of `small`, and one change at a time."]
    for folder in _processors(results):
        rows = pd.read_csv(folder / "cost.csv").set_index(["batch", "length", "loops", "d"])
        columns = {}
        for threads in rows["threads"].unique():
            own = rows[rows["threads"] == threads]
            many = "1 thread" if threads == 1 else f"{threads} threads"
            columns[f"tokens/s, {many}"] = cells(own["tokens_per_second"], "{:.0f}")
            columns[f"peak GB, {many}"] = cells(own["peak_memory_bytes"] / 1e9, "{:.2f}")
        first = rows.iloc[0]
        said.append(f"{first['device']}, {first['isa']}, in {first['precision']}:")
        said.append(table(pd.concat(columns, axis=1).reset_index()))
    return "\n\n".join(said)


def _processors(results: Path) -> tuple[Path, Path]:
    """The folders of measurements with all of the processor, and with its AVX2 alone."""
    return results / "bench", results / "bench" / "avx2"


def costliest_operations(results: Path) -> str:
    """`crt bench step`: where a training step of `crt2` spends its time, and what was saved."""
    costs = pd.read_csv(results / "bench" / "step_costs.csv")
    paths = pd.read_csv(results / "bench" / "step.csv")
    named = ", ".join(f"`{row.operation}` {row.share:.0%}" for row in costs.itertuples())
    faster = ", ".join(f"{row.path} {row.speedup:.2f}x" for row in paths[1:].itertuples())
    shares = []
    for folder in _processors(results):
        updates = pd.read_csv(folder / "step_updates.csv")
        of_updates = ", ".join(
            f"{row.profile} {row.recipe} ({row.optimizer}, {row.precision}) "
            f"{row.optimizer_share:.1%}"
            for row in updates.itertuples()
        )
        shares.append(f"{updates['isa'][0]}, {of_updates}")
    first = paths.iloc[0]
    return (
        f"A training step of `crt2` at the size of `{first['profile']}` ({_where(first)}) spends "
        f"most in {named}. Against a step that keeps whole logits and trains every exit: {faster}. "
        f"The optimiser's share of an update: {'; '.join(shares)}."
    )


def _where(row: pd.Series) -> str:
    """The machine and precision of a measured row."""
    return f"{row['device']}, {row['isa']}, {row['threads']} threads, {row['precision']}"


def decoding(results: Path) -> str:
    """`crt bench decode` on `crt2` at small: a row a way, speed for each batch size."""
    rows = pd.read_csv(results / "small" / "crt2" / "decode.csv")
    ways = rows.drop_duplicates("way").set_index("way")
    fixed = [way for way in CRITERIA if way in ways.index and pd.isna(ways["tau"][way])]
    shown = ways.drop(fixed)
    made = pd.DataFrame(
        {
            "decoding": shown.index,
            "mean loops": cells(shown["mean_loops"], "{:.2f}"),
            "multiply-adds": cells(shown["multiply_adds"] / 1e6, "{:.2f}M"),
            "test PPL": cells(shown["token_ppl"], "{:.2f}"),
        }
    )
    for batch, own in rows.set_index("way").groupby("batch"):
        speeds = cells(own["tokens_per_second"], "{:.0f}") + cells(own["speedup"], " ({:.2f}x)")
        made[f"tokens/s, {batch} at a time"] = speeds
    first = rows[rows["way"] == "full depth"].iloc[0]
    return (
        f"{table(made)}\n\n"
        f"{first['new_tokens']} new tokens, greedy, medians of {first['rounds']} rounds, "
        f"{ways['rounds']['no cache']} without a cache ({_where(first)}), the first token apart; "
        "in brackets the speed against full depth in the same round. PPL of the first 50,000 "
        "tokens of test. Criteria are calibrated to lose at most 0.5 % of the PPL; "
        f"{', '.join(fixed)} then take a fixed exit, because asking them costs more than it "
        f"saves.\n\nThose speeds are of text that the model writes, their PPL is of test. Both "
        f"from the same tokens:\n\n{taken([results / 'small/crt2/taken.csv'])}\n\n"
        f"{_bounds(results, rows)}"
    )


def taken(files: Sequence[Path]) -> str:
    """`crt bench exits`: loss and speed of policies on the same tokens, a table for each file."""
    return "\n\n".join([*map(_taken, files), _TAKEN])


_TAKEN = (
    "PPL per token and speed against full depth, in brackets the 95 % interval over windows; of "
    "fixed: against the fastest fixed exit that loses no more; of mix: against a random mix of two "
    "fixed exits of the same mean loops. The oracle knows each token's loss."
)


def _taken(file: Path) -> str:
    rows = pd.read_csv(file)
    rows = rows[~rows["policy"].str.startswith(MIX)]
    by = [cells(np.expm1(rows[name]), "{:+.2%}") for name in ("above", "low", "high")]
    rows["PPL"] = by[0] + " [" + by[1] + ", " + by[2] + "]"
    beside = cells(rows["over_fixed"], "{:.2f}x of fixed") + cells(
        rows["over_mix"], ", {:.2f}x of mix"
    )
    rows["speed"] = cells(rows["speedup"], "{:.2f}x") + (" (" + beside + ")").where(
        rows["asks"] > 0, ""
    )
    first = rows.sort_values("rows").drop_duplicates("policy", keep="last").set_index("policy")
    made = pd.DataFrame({"policy": first.index, "mean loops": cells(first["mean_loops"], "{:.2f}")})
    most = rows["rows"].max()
    made = made.set_index("policy", drop=False).assign(**{f"PPL, {most} at a time": first["PPL"]})
    for count, own in rows.groupby("rows"):
        made[f"speed, {count} at a time"] = own.set_index("policy")["speed"]
    counts = ", ".join(f"{n:,}" for n in rows.drop_duplicates("rows")["tokens"])
    where = _where(rows.iloc[0])
    return f"Test read a token at a time ({counts} tokens; {where}):\n\n{table(made)}"


def _bounds(results: Path, rows: pd.DataFrame) -> str:
    """How near full depth comes to reading its weights, and what 8 bits lose."""
    _, avx2 = _processors(results)
    both = pd.concat([rows, pd.read_csv(avx2 / "decode.csv")])
    said = "; ".join(
        f"{full.isa}, {full.batch} at a time {full.ms:.2f} ms "
        f"({full.ms_p5:.2f} to {full.ms_p95:.2f}), {full.bound_share:.0%} and "
        f"{full.bound_share_all:.0%}; one thread {full.bound_share_1:.0%} and "
        f"{full.bound_share_all_1:.0%}"
        for full in both[both["way"] == "full depth"].itertuples()
    )
    lost = pd.read_csv(results / "bench" / "quantize.csv")
    loses = ", ".join(
        f"{row.word_ppl_ratio - 1:.2%} with {row.rows} at a time "
        f"({row.quantized_weight_mb:.0f} of {row.weight_mb:.0f} MB)"
        for row in lost[lost["exit"] == lost["exit"].max()].itertuples()
    )
    return (
        "A step at full depth, and the share of it that the products with its weights take alone, "
        f"without and with keys and values: {said}. 8-bit weights add to the word "
        f"perplexity of test {loses}."
    )
