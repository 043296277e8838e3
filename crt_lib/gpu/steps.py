"""`crt gpu`, parts memory and steps: what training at Table 1's size takes on this device.

MFU counts six FLOPs a multiply-add of the forward pass, nothing twice, and is held against the
fastest matrix product in the update's own precision, measured in the same process.
"""

import gc
from typing import Any

import torch

from crt_lib.bench.table import Table
from crt_lib.bench.trial import best_device, measure_on_random
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.device import DTYPES
from crt_lib.gpu.parts import Job, Row, say
from crt_lib.runs.machine import limit_memory, matmul_peak, utilisation
from crt_lib.runs.manifest import peak_memory, run_environment
from crt_lib.runs.profiles import load_profile

LIMIT = 6.0  # gigabytes of the card that the paper names
SECONDS = 5.0  # of updates of a shape
SETTINGS = ("batch_size", "grad_accum", "seq_len", "precision")  # shown of a shape
PAPER = "2 rows x 8, recomputed"  # section 3.3
SHAPES: dict[str, dict[str, Any]] = {  # what matters most first: time may end
    "32 rows": {"batch_size": 32, "grad_accum": 1},
    "32 rows, compiled": {"batch_size": 32, "grad_accum": 1, "compile": True},
    "8 rows": {"batch_size": 8, "grad_accum": 1},
    PAPER: {"gradient_checkpointing": True},
    "64 rows": {"batch_size": 64, "grad_accum": 1},
    "64 rows, compiled": {"batch_size": 64, "grad_accum": 1, "compile": True},
}
TOY_SHAPES: dict[str, dict[str, Any]] = {"2 rows": {"grad_accum": 1}, PAPER: SHAPES[PAPER]}


def run_memory(job: Job) -> None:
    """The paper's batch on a GPU of `LIMIT` GB: a row of steps.csv; raises if it does not fit."""
    if not job.toy:
        limit_memory(LIMIT)
    (row,) = _measure(job, {PAPER: SHAPES[PAPER]}, f"{LIMIT:g} GB")
    if row["error"]:
        raise RuntimeError(f"the paper's batch does not fit into {LIMIT:g} GB: {row['error']}")


def run_steps(job: Job) -> None:
    """A row of steps.csv for each way of making an update; raises if none of them fits."""
    rows = _measure(job, TOY_SHAPES if job.toy else SHAPES, "none")
    if all(row["error"] for row in rows):
        raise RuntimeError(rows[0]["error"])


def _measure(job: Job, shapes: dict[str, dict[str, Any]], limit: str) -> list[Row]:
    """The rows of `shapes`, made where steps.csv has none."""
    device, precision = best_device(), "fp32" if job.toy else "bf16"
    table = Table(job.out / "steps.csv", "shape", "memory_limit")
    tries = 1 if job.toy else 10  # clocks take a while
    peak = max(matmul_peak(device, DTYPES[precision], 1024) for _ in range(tries))
    for name, changes in shapes.items():
        if table.find(name, limit):
            continue
        length = 32 if job.toy else 384
        train = TrainConfig().replace(seq_len=length, precision=precision, **changes)
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = _row(train, job.toy, peak)
        table.put([{"shape": name, "memory_limit": limit} | row])
        told = row["error"] or f"{row['tokens_per_second']:.0f} tokens/s, MFU {row['mfu']:.1%}"
        say(f"  {name}: {told}, {row['memory'] / 1e9:.2f} GB")
    return [row for name in shapes for row in table.find(name, limit)]


def _row(train: TrainConfig, toy: bool, peak: float) -> Row:
    """An update by micro-batches counted from one, and memory; `error` where it is too little."""
    smoke = load_profile("smoke", "paper").model.replace(vocab_size=500)
    model = smoke if toy else ModelConfig()
    row: Row = {name: getattr(train, name) for name in SETTINGS}
    row |= {"device": run_environment()["device"], "matmul_peak": peak}
    row |= dict.fromkeys(("updates", "seconds", "tokens_per_second", "mfu", "error"))
    try:
        found = measure_on_random(model, train, SECONDS)
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    else:
        row["updates"], row["seconds"] = found.updates, found.update(train.grad_accum)
        positions = train.batch_size * train.grad_accum * train.seq_len
        row["tokens_per_second"] = positions / row["seconds"]
        row["mfu"] = utilisation(model, train, [row["seconds"]], peak)
    return row | {"memory": peak_memory()}
