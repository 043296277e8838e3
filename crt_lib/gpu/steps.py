"""`crt gpu`, parts memory and steps: what training at Table 1's size takes on this device.

MFU counts six FLOPs a multiply-add of the forward pass, nothing twice, and is held against the
fastest matrix product in the update's own precision, measured in the same process.
"""

from collections.abc import Mapping
from typing import Any

from crt_lib.bench.step import update_row
from crt_lib.bench.table import put_rows, rows_of
from crt_lib.bench.trial import try_random
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.files import InputError
from crt_lib.gpu.parts import Job, say
from crt_lib.runs.machine import utilisation
from crt_lib.runs.profiles import load_profile

LIMIT = 6.0  # gigabytes of the card that the paper names
SECONDS = 5.0  # of updates of a shape
Shapes = Mapping[str, dict[str, Any]]
PAPER: Shapes = {"2 rows x 8, recomputed": {"gradient_checkpointing": True}}  # section 3.3
SHAPES: Shapes = {  # what matters most first: time may end
    "32 rows": {"batch_size": 32, "grad_accum": 1},
    "32 rows, compiled": {"batch_size": 32, "grad_accum": 1, "compile": True},
    "8 rows": {"batch_size": 8, "grad_accum": 1},
    **PAPER,
    "64 rows": {"batch_size": 64, "grad_accum": 1},
    "64 rows, compiled": {"batch_size": 64, "grad_accum": 1, "compile": True},
}
TOY_SHAPES: Shapes = {"2 rows": {"grad_accum": 1}, **PAPER}


def run_steps(job: Job, shapes: Shapes | None = None, gigabytes: float | None = None) -> None:
    """A row of steps.csv for each way of making an update, with so much of the GPU's memory.

    Raises RuntimeError if none of them fits.
    """
    shapes = shapes or (TOY_SHAPES if job.toy else SHAPES)
    table, limit = job.out / "steps.csv", f"{gigabytes:g} GB" if gigabytes else "none"
    model: Any = ModelConfig()
    sizes: dict[str, Any] = {"precision": "bf16"}
    if job.toy:
        model = load_profile("smoke", "paper").model.replace(vocab_size=500)
        sizes, gigabytes = {"seq_len": 32, "precision": "fp32"}, None
    for name, changes in shapes.items():
        row: dict[str, Any] = {"shape": name, "memory_limit": limit}
        if rows_of(table, **row):
            continue
        train = TrainConfig().replace(**sizes, **changes)
        try:
            found = try_random(model, train, SECONDS, gigabytes=gigabytes)
        except InputError as error:
            row["error"] = str(error)
        else:
            row |= {"error": None} | update_row(train, found) | found.ends
            update = [found.update(train.grad_accum)]
            row["mfu"] = utilisation(model, train, update, row["matmul_peak"])
        put_rows(table, [row], ["shape", "memory_limit"])
        say("  " + ", ".join(f"{column} {value}" for column, value in row.items() if value))
    rows = [row for row in rows_of(table, memory_limit=limit) if row["shape"] in shapes]
    if all(row["error"] for row in rows):
        raise RuntimeError(f"memory limit {limit}: {rows[0]['error']}")
