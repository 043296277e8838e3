"""Where CRT stands: measured runs beside published numbers, from the files under results/."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crt_lib.audit.accounting import multiply_adds
from crt_lib.bench.table import rows_of
from crt_lib.config import config_from_dict
from crt_lib.files import InputError, read_rows
from crt_lib.runs.run import Run, load_run

PAPER_TABLE_4 = (  # as printed: model, parameters, perplexity on WikiText-103
    ("GPT-2 Small", "124M", "~18-20"),
    ("DistilGPT2", "82M", "~25-30"),
    ("CRT v2 Full (8 Loops)", "92M", "1.10"),
    ("CRT v2 (Loop 6)", "92M", "1.08"),
)
SCORINGS = (  # what is scored: folder of small, protocol, how it is said
    ("released", "released", "the released block, as the paper scores it"),
    ("released", "honest", "the same, padding not scored"),
    ("released", "deployable", "the same, with nothing after the predicted token to see"),
    ("paper", "honest", "the paper's block made causal"),
    ("gpt2", "honest", "a GPT-2 of crt2's size"),
    ("gpt2_7_layers", "honest", "a GPT-2 of crt2's multiply-adds"),
    ("crt2", "honest", "crt2, the corrected recipe"),
)
WAYS = {  # prefix of the files `crt evaluate --out` made in an attempt's folder -> how it is said
    "average": "average of its last weights",
    "sliding": "in sliding windows",
}
Rows = list[dict[str, Any]]


def finished_run(folder: str | Path) -> Run:
    """The run in `folder`; raises InputError where there is none that has finished."""
    run = load_run(folder)
    if run is None:
        raise InputError(f"no finished run in {folder}; `crt train --profile small`")
    return run


def exits_of(rows: Rows, protocol: str = "honest", **kind: str) -> Rows:
    """The rows of a run that are of these, as `split`: a row an exit, the last exit last."""
    kind["protocol"] = protocol
    own = [row for row in rows if kind.items() <= row.items()]
    return sorted(own, key=lambda row: row["exit"])


def chosen(metrics: Rows) -> dict[str, Any]:
    """The validation whose weights are scored: the first that is lowest at the last exit.

    `metrics`: of a run. The row has `update`, `tokens` (seen so far), and `loss` of the last exit.
    """
    validations = [row for row in metrics if "loss" not in row]
    *_, last = validations[0]  # exits stand in order
    return (row := min(validations, key=lambda row: row[last])) | {"loss": row[last]}


def ends(run: Run) -> dict[str, float]:
    """A run's last exit, nats a token: where its weights were chosen, on all of valid, trained.

    `trained`: the mean over the batches of the updates since the validation before the last.
    """
    every = run.manifest["train"]["eval_every"]
    whole = exits_of(run.results, split="valid")[-1]
    batches = [row[f"loss_{whole['exit']}"] for row in run.metrics if "loss" in row][-every:]
    trained = math.fsum(batches) / len(batches)
    return {"chosen": chosen(run.metrics)["loss"], "valid": whole["loss"], "trained": trained}


def trainings(small: Path, model: Mapping[str, Any]) -> int:
    """How many trainings at small were made of a model's kind: its seeds, and those of tried.csv.

    The kind of a GPT-2 is its depth; that of a CRT whether it is the paper's block or `crt2`.
    """

    def kind(of: Mapping[str, Any]) -> list[Any]:
        block = of.get("residual") or "post", of.get("causal", True)
        return [of["vocab_size"], of.get("n_layers"), *block]

    configs = [json.loads(path.read_text("utf-8")) for path in small.rglob("config.json")]
    made = [config["model"] for config in configs] + rows_of(small / "tried.csv")
    return sum(kind(of) == kind(model) for of in made)


def measured_rows(folders: Mapping[str, Path]) -> Rows:
    """A row a run and exit: what it costs and reaches on test, honest protocol.

    `folders`: name -> folder of a finished run. `multiply_adds` are a token's, at the training's
    length, up to the exit and with its head alone; `tokens_seen` are those of the scored weights,
    repetitions counted. Raises InputError for a folder without a finished run.
    """
    rows = []
    for name, folder in folders.items():
        run = finished_run(folder)
        made, seen = run.manifest, chosen(run.metrics)["tokens"]
        config = config_from_dict(made["model"])
        for row in exits_of(run.results, split="test"):
            counts = multiply_adds(config, made["train"]["seq_len"], (row["exit"],))
            said = name if len(config.head_loops) == 1 else f"{name}, loop {row['exit']}"
            costs = {"parameters": made["parameters"], "multiply_adds": sum(counts.values())}
            own = {kind: row[kind] for kind in ("word_ppl", "bits_per_byte")}
            rows.append({"model": said, **costs, "tokens_seen": seen, **own})
    return rows


def leak_rows(small: str | Path) -> Rows:
    """The perplexity of the last exit on valid in every way of SCORINGS, from runs at small.

    A row has `name`, `ppl`, and whether the model `sees` the token it predicts. Raises InputError
    for a run that is not there.
    """
    rows = []
    for folder, protocol, name in SCORINGS:
        run = finished_run(Path(small) / folder)
        sees = not run.manifest["model"].get("causal", True) and protocol != "deployable"
        last = exits_of(run.results, protocol, split="valid")[-1]
        rows.append({"name": name, "ppl": last["token_ppl"], "sees": sees})
    return rows


def _attempts(folder: str | Path) -> dict[Path, Run]:
    """The finished runs in the folders of `folder`."""
    runs = {path: load_run(path) for path in sorted(Path(folder).iterdir())}
    return {path: run for path, run in runs.items() if run is not None}


def attempt_rows(folder: str | Path) -> Rows:
    """The finished runs in the folders of `folder`, each as trained and in the WAYS stored of it.

    A row has `model`, `way`, `parameters`, `dropout`, `weight_decay`, `tokens_seen`, the tokens of
    the `text`, its `vocabulary`, and word perplexities of the last exit, `valid` and `test`; None
    where it was not measured.
    """
    rows = []
    for path, run in _attempts(folder).items():
        made = run.manifest
        common = {
            "model": path.name,
            "parameters": made["parameters"],
            "dropout": made["model"]["dropout"],
            "weight_decay": made["train"]["weight_decay"],
            "text": made["data"]["splits"]["train"]["tokens"],
            "vocabulary": made["data"]["vocab_size"],
        }
        scored = {"as trained": run.results}
        for prefix, way in WAYS.items():
            scored[way] = [row for p in path.glob(f"{prefix}_*.csv") for row in read_rows(p)]
        for way in (way for way, found in scored.items() if found):
            exits = {split: exits_of(scored[way], split=split) for split in ("valid", "test")}
            ppl = {split: own[-1]["word_ppl"] if own else None for split, own in exits.items()}
            weights = run.metrics[-1] if way == WAYS["average"] else chosen(run.metrics)
            rows.append(common | {"way": way, "tokens_seen": weights["tokens"]} | ppl)
    return rows


def attempt_curves(folder: str | Path) -> dict[str, list[tuple[float, float]]]:
    """name -> (millions of tokens seen, perplexity a token on the start of valid) in training."""
    curves = {}
    for path, run in _attempts(folder).items():
        loss = f"valid_loss_{max(row['exit'] for row in run.results)}"
        scored = [row for row in run.metrics if loss in row]
        curves[path.name] = [(row["tokens"] / 1e6, math.exp(row[loss])) for row in scored]
    return curves


def published_rows(path: str | Path, corpus: str) -> Rows:
    """The rows of published.csv on `corpus`, best last; `word_ppl` or `token_ppl` is None."""
    rows = [row for row in read_rows(Path(path)) if row["corpus"] == corpus]
    for row in rows:
        row["parameters"] = row["parameters"] and round(float(row["parameters"].rstrip("M")) * 1e6)
        row |= dict.fromkeys(("word_ppl", "token_ppl")) | {f"{row['unit']}_ppl": row["ppl"]}
    return sorted(rows, key=lambda row: -row["ppl"])


def best_at_cost(rows: Sequence[Mapping[str, Any]], cost: str) -> list[Mapping[str, Any]]:
    """The rows that no other beats in bits per byte at the same `cost` or less, cheapest first."""
    kept: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], row["bits_per_byte"])):
        if not kept or row["bits_per_byte"] < kept[-1]["bits_per_byte"]:
            kept.append(row)
    return kept
