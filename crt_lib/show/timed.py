"""Blocks about measured time and memory: training steps, their parts and sizes, and decoding."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from crt_lib.bench.exits import MIX, ORACLE
from crt_lib.bench.gpt2 import COMPILED, name_of
from crt_lib.config import GPT2Config, config_from_dict
from crt_lib.exits.policy import CRITERIA
from crt_lib.show.templates import render
from crt_lib.study.sota import chosen, exits_of, finished_run

TRAINED = ("gpt2", "gpt2_7_layers")  # whose PPL stands beside the speed of their shapes


def training_benchmark(results: Path) -> str:
    """`crt bench train`: the released-style step against ours, then where ours spends its time."""
    rows, parts = (_cases(results / "bench" / f"{name}.csv") for name in ("train", "train_parts"))
    released, ours = (rows[rows["side"] == side].itertuples() for side in ("released", "ours"))
    return render("bench", pairs=list(zip(released, ours, strict=True)), parts=parts)


def _cases(path: Path) -> pd.DataFrame:
    """A table of steps, with the `step` of each row in words."""
    rows = pd.read_csv(path)
    return rows.assign(step=rows["rows"].astype(str) + " x " + rows["seq_len"].astype(str))


def cost_against_size(results: Path) -> str:
    """`crt bench cost`: tokens/s and peak memory, a row a size, a column a number of threads."""
    return render("cost", processors=_of_processors(results, "cost.csv"))


def _of_processors(results: Path, name: str) -> list[pd.DataFrame]:
    """What was measured with all of the processor, and with its AVX2 alone."""
    return [pd.read_csv(results / folder / name) for folder in ("bench", "bench/avx2")]


def costliest_operations(results: Path) -> str:
    """`crt bench step`: where a training step of `crt2` spends its time, and what was saved."""
    return render(
        "step",
        paths=pd.read_csv(results / "bench" / "step.csv"),
        costs=pd.read_csv(results / "bench" / "step_costs.csv"),
        processors=_of_processors(results, "step_updates.csv"),
    )


def decoding(results: Path) -> str:
    """`crt bench decode` on `crt2` at small: a row a way, speed for each batch size.

    A GPT-2's PPL is that of the trained one of its shape. Then policies on the tokens that they are
    timed on, how near full depth comes to reading its weights, and what 8 bits lose.
    """
    small = results / "small" / "crt2"
    rows = pd.read_csv(small / "decode.csv")
    ways = rows.drop_duplicates("way").set_index("way")
    both = pd.concat([rows, pd.read_csv(results / "bench" / "avx2" / "decode.csv")])
    lost = pd.read_csv(results / "bench" / "quantize.csv")
    for folder in TRAINED:
        run = finished_run(results / "small" / folder)
        (scored,) = exits_of(run.results, split="test")
        name = name_of(GPT2Config.from_dict(run.manifest["model"]))
        ways.loc[ways.index.isin([name, name + COMPILED]), "token_ppl"] = scored["token_ppl"]
    return render(
        "decode",
        ways=ways,
        fixed=[way for way in CRITERIA if way in ways.index and pd.isna(ways["tau"][way])],
        batches={batch: own.set_index("way") for batch, own in rows.groupby("batch")},
        taken=taken([small / "taken.csv"]),
        full=both[both["way"] == "full depth"],
        quantized=lost[lost["exit"] == lost["exit"].max()],
    )


def assisted(results: Path) -> str:
    """`crt bench assisted`: a row a way to write, a column a trained model."""
    rows, models = pd.read_csv(results / "small" / "assisted.csv"), []
    for folder, own in rows.groupby("run", sort=False):
        run = finished_run(results.parent / str(folder))
        config = config_from_dict(run.manifest["model"])
        name = name_of(config) if isinstance(config, GPT2Config) else run.manifest["recipe"]
        scored, trained = exits_of(run.results, split="test")[-1], chosen(run.metrics)
        models.append((name, trained["tokens"], scored["word_ppl"], own.set_index("way")))
    ways, first = rows["way"].unique(), rows.iloc[0]
    return render("assisted", models=models, ways=ways, first=first, same=rows["same"].min())


def taken(files: Sequence[Path]) -> str:
    """`crt bench exits`: loss and speed of policies on the same tokens, a table for each file."""
    tables = map(pd.read_csv, files)
    shown = [t[~t["policy"].str.startswith(MIX)] for t in tables]
    return render("taken", files=shown, oracle=ORACLE)


def foreseen(foresight: Path, files: Sequence[Path]) -> pd.DataFrame:
    """`crt foresight` by who knows, once for each of `files` of `crt bench exits`; and a column a
    number of rows decoded at a time: how many times as fast as the fixed exit one would be there
    who runs `loops` and asks for nothing.
    """
    found = []
    for path in files:
        rows = pd.read_csv(foresight).set_index("who", drop=False)
        fixed, best = rows["fixed"].iloc[0], rows["best"].iloc[0]
        for count, ms in pd.read_csv(path).pivot_table("ms", "rows", "policy").iterrows():
            a_loop = (ms[f"exit {best}"] - ms["exit 1"]) / (best - 1)
            saved = (fixed - rows["loops"]) * a_loop
            rows[count] = ms[f"exit {fixed}"] / (ms[f"exit {fixed}"] - saved)
        found.append(rows)
    return pd.concat(found)
