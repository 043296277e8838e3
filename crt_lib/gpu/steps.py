"""`crt gpu`, parts memory and steps: what training at Table 1's size takes on this device.

MFU counts six FLOPs a multiply-add of the forward pass, nothing twice, and is held against the
fastest matrix product in the update's own precision, measured in the same process.
"""

from typing import Any

from crt_lib.bench.step import update_row
from crt_lib.bench.table import put_rows, rows_of
from crt_lib.bench.trial import try_random
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.files import InputError
from crt_lib.gpu.parts import Job, Row, say
from crt_lib.runs.machine import utilisation
from crt_lib.runs.profiles import load_profile

LIMIT = 6.0  # gigabytes of the card that the paper names
SECONDS = 5.0  # of updates of a shape
PAPER = {"2 rows x 8, recomputed": {"gradient_checkpointing": True}}  # section 3.3
SHAPES: dict[str, dict[str, Any]] = {  # what matters most first: time may end
    "32 rows": {"batch_size": 32, "grad_accum": 1},
    "32 rows, compiled": {"batch_size": 32, "grad_accum": 1, "compile": True},
    "8 rows": {"batch_size": 8, "grad_accum": 1},
    **PAPER,
    "64 rows": {"batch_size": 64, "grad_accum": 1},
    "64 rows, compiled": {"batch_size": 64, "grad_accum": 1, "compile": True},
}
TOY_SHAPES: dict[str, dict[str, Any]] = {"2 rows": {"grad_accum": 1}, **PAPER}


def run_memory(job: Job) -> None:
    """The paper's batch on a GPU of `LIMIT` GB: a row of steps.csv; raises if it does not fit."""
    _measure(job, PAPER, LIMIT)


def run_steps(job: Job) -> None:
    """A row of steps.csv for each way of making an update; raises if none of them fits."""
    _measure(job, TOY_SHAPES if job.toy else SHAPES)


def _measure(job: Job, shapes: dict[str, dict[str, Any]], gigabytes: float | None = None) -> None:
    """Rows of updates, made where steps.csv has none."""
    table, limit = job.out / "steps.csv", f"{gigabytes:g} GB" if gigabytes else "none"
    model: Any = ModelConfig()
    if job.toy:
        model = load_profile("smoke", "paper").model.replace(vocab_size=500)
    for name, changes in shapes.items():
        key = {"shape": name, "memory_limit": limit}
        if rows_of(table, **key):
            continue
        sizes = {"seq_len": 32, "precision": "fp32"} if job.toy else {"precision": "bf16"}
        train = TrainConfig().replace(**sizes, **changes)
        row: Row = key | {"error": None}
        try:
            found = try_random(model, train, SECONDS, gigabytes=None if job.toy else gigabytes)
        except InputError as error:
            row["error"] = str(error)
            say(f"  {name}: {error}")
        else:
            row |= update_row(train, found) | found.ends
            row["mfu"] = utilisation(
                model, train, [found.update(train.grad_accum)], row["matmul_peak"]
            )
            memory = row["peak_memory_bytes"] / 1e9
            say(f"  {name}: {row['update_ms']} ms, MFU {row['mfu']:.1%}, {memory:.2f} GB")
        put_rows(table, [row], list(key))
    rows = [row for row in rows_of(table, memory_limit=limit) if row["shape"] in shapes]
    if all(row["error"] for row in rows):
        raise RuntimeError(f"memory limit {limit}: {rows[0]['error']}")
