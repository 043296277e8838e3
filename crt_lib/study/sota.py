"""Where CRT stands: measured runs beside published numbers, from the files under results/."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crt_lib.audit.accounting import multiply_adds
from crt_lib.config import config_from_dict
from crt_lib.files import InputError, read_rows
from crt_lib.runs.run import Run, load_run

PAPER_TABLE_4 = (  # as printed: model, parameters, perplexity on WikiText-103
    ("GPT-2 Small", "124M", "~18-20"),
    ("DistilGPT2", "82M", "~25-30"),
    ("CRT v2 Full (8 Loops)", "92M", "1.10"),
    ("CRT v2 (Loop 6)", "92M", "1.08"),
)


def measured_rows(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A row a run and exit: what it costs and reaches on test, honest protocol.

    `folders`: name -> folder of a finished run. `multiply_adds` are a token's, at the training's
    length, up to the exit and with its head alone; `tokens_seen` counts repetitions. Raises
    InputError for a folder without a finished run.
    """
    rows = []
    for name, folder in folders.items():
        run = load_run(folder)
        if run is None:
            raise InputError(f"no finished run in {folder}; `crt train --profile small`")
        rows += [_measured(name, run, row) for row in run.results if _is_honest_test(row)]
    return rows


SCORINGS = (  # what is scored: folder of small, protocol, how it is said
    ("released", "released", "the released block, as the paper scores it"),
    ("released", "honest", "the same, padding not scored"),
    ("released", "deployable", "the same, with nothing after the predicted token to see"),
    ("paper", "honest", "the paper's block made causal"),
    ("gpt2", "honest", "a GPT-2 of crt2's size"),
    ("crt2", "honest", "crt2, the corrected recipe"),
)


def leak_rows(small: str | Path) -> list[dict[str, Any]]:
    """The perplexity of the last exit on valid in every way of SCORINGS, from runs at small.

    A row has `name`, `ppl`, and whether the model `sees` the token it predicts. Raises InputError
    for a run that is not there.
    """
    rows = []
    for folder, protocol, name in SCORINGS:
        run = load_run(Path(small) / folder)
        if run is None:
            raise InputError(f"no finished run in {Path(small) / folder}")
        loop = max(row["exit"] for row in run.results)
        (row,) = (
            row
            for row in run.results
            if (row["split"], row["protocol"], row["exit"]) == ("valid", protocol, loop)
        )
        sees = not run.manifest["model"].get("causal", True) and protocol != "deployable"
        rows.append({"name": name, "ppl": row["token_ppl"], "sees": sees})
    return rows


WAYS = {  # prefix of the files `crt evaluate --out` made in an attempt's folder -> how it is said
    "average": "average of its last weights",
    "sliding": "in sliding windows",
}


def attempt_rows(folder: str | Path) -> list[dict[str, Any]]:
    """The finished runs in the folders of `folder`, each as trained and in the WAYS stored of it.

    A row has `model`, `way`, `parameters`, `dropout`, `weight_decay`, `tokens_seen`, the tokens of
    the `text`, its `vocabulary`, and word perplexities of the last exit, `valid` and `test`; None
    where it was not measured.
    """
    rows = []
    for path in sorted(Path(folder).iterdir()):
        run = load_run(path)
        if run is None:
            continue
        common = {
            "model": path.name,
            "parameters": run.manifest["parameters"],
            "dropout": run.manifest["model"]["dropout"],
            "weight_decay": run.manifest["train"]["weight_decay"],
            "tokens_seen": run.metrics[-1]["tokens"],
            "text": run.manifest["data"]["splits"]["train"]["tokens"],
            "vocabulary": run.manifest["data"]["vocab_size"],
        }
        of_way = {"as trained": run.results}
        for prefix, way in WAYS.items():
            files = sorted(path.glob(f"{prefix}_*.csv"))
            of_way |= {way: [row for file in files for row in read_rows(file)]} if files else {}
        for way, measured in of_way.items():
            honest = [row for row in measured if row["protocol"] == "honest"]
            rows.append(common | {"way": way} | {s: _last(honest, s) for s in ("valid", "test")})
    return rows


def attempt_curves(folder: str | Path) -> dict[str, list[tuple[float, float]]]:
    """name -> (millions of tokens seen, perplexity a token on the start of valid) in training."""
    curves = {}
    for path in sorted(Path(folder).iterdir()):
        run = load_run(path)
        if run is not None:
            loop = max(row["exit"] for row in run.results)
            curves[path.name] = [
                (row["tokens"] / 1e6, math.exp(row[f"valid_loss_{loop}"]))
                for row in run.metrics
                if f"valid_loss_{loop}" in row
            ]
    return curves


def _last(rows: Sequence[Mapping[str, Any]], split: str) -> float | None:
    of_split = [row for row in rows if row["split"] == split]
    return max(of_split, key=lambda row: row["exit"])["word_ppl"] if of_split else None


def _is_honest_test(row: Mapping[str, Any]) -> bool:
    return (row["split"], row["protocol"]) == ("test", "honest")


def _measured(name: str, run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    config = config_from_dict(run.manifest["model"])
    loop, length = row["exit"], run.manifest["train"]["seq_len"]
    counts = multiply_adds(config, length, (loop,))
    return {
        "model": name if len(config.head_loops) == 1 else f"{name}, loop {loop}",
        "corpus": run.manifest["corpus"],
        "parameters": run.manifest["parameters"],
        "multiply_adds": sum(counts.values()),
        "tokens_seen": run.metrics[-1]["tokens"],
        "word_ppl": row["word_ppl"],
        "bits_per_byte": row["bits_per_byte"],
        "sees_the_future": not getattr(config, "causal", True),
        "source": "measured",
    }


def published_rows(path: str | Path, corpus: str) -> list[dict[str, Any]]:
    """The rows of published.csv on `corpus`, best last, with the columns of `measured_rows`."""
    rows = [row for row in read_rows(Path(path)) if row["corpus"] == corpus]
    rows = [
        {
            "model": row["model"],
            "corpus": corpus,
            "parameters": _count(row["parameters"]),
            "word_ppl": row["ppl"] if row["unit"] == "word" else None,
            "token_ppl": row["ppl"] if row["unit"] == "token" else None,
            "source": row["source"],
        }
        for row in rows
    ]
    return sorted(rows, key=lambda row: -(row["word_ppl"] or row["token_ppl"]))


def _count(text: str | None) -> int | None:
    return None if text is None else round(float(text.removesuffix("M")) * 1e6)


def best_at_cost(rows: Sequence[Mapping[str, Any]], cost: str) -> list[Mapping[str, Any]]:
    """The rows that no other beats in bits per byte at the same `cost` or less, cheapest first."""
    kept: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], row["bits_per_byte"])):
        if not kept or row["bits_per_byte"] < kept[-1]["bits_per_byte"]:
            kept.append(row)
    return kept
