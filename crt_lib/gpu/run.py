"""`crt gpu`: all that is to be measured on a GPU, in one command."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from crt_lib.bench.table import put_rows, rows_of
from crt_lib.files import InputError
from crt_lib.gpu.checks import run_checks
from crt_lib.gpu.parts import Job, Part, run_parts
from crt_lib.gpu.steps import LIMIT, PAPER, run_steps
from crt_lib.gpu.training import run_training
from crt_lib.runs.manifest import checkout_root
from crt_lib.study.analysis import analyse

DECODED = Path("results/small/crt2")  # the run that decodes: policies and traces are stored there


def run_decode(job: Job) -> None:
    """The rows of `crt bench decode` for one text and for eight at a time, in decode.csv."""
    judged, table = analyse(checkout_root() / DECODED), job.out / "decode.csv"
    new_tokens = 4 if job.toy else 64
    for rows, batches in ((1, 6), (8, 3)):
        if not rows_of(table, batch=rows):
            prompts = judged.prompts(rows * (1 if job.toy else batches), new_tokens)
            how = {"new_tokens": new_tokens, "compiled": not job.toy}
            put_rows(table, judged.bench(prompts, rows, **how), ["batch"])


PARTS: dict[str, Part] = {
    "checks": (3, run_checks),
    "memory": (1, partial(run_steps, shapes=PAPER, gigabytes=LIMIT)),
    "steps": (6, run_steps),
    "decode": (4, run_decode),
    "training": (8, run_training),
}


def run_gpu(
    out: Path, *, minutes: float = 9.0, rehearse: bool = False, only: Sequence[str] = ()
) -> int:
    """Run the parts that `out` does not hold; the exit status: 0 done, 1 not all.

    Raises InputError without a GPU, for an unknown part, for minutes that are not positive, and for
    a folder that holds something else.
    """
    if unknown := set(only) - set(PARTS):
        raise InputError(f"unknown part {min(unknown)!r}; choose of {', '.join(PARTS)}")
    if not minutes > 0:
        raise InputError(f"minutes is {minutes}; it must be positive")
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; --rehearse runs at toy size on the CPU")
    chosen = {name: part for name, part in PARTS.items() if not only or name in only}
    done = run_parts(chosen, out, minutes=minutes, toy=rehearse)
    print(f"tables and manifest: {out}" if done else f"not all is done; go on with {out}")
    return int(not done)
