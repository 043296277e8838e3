"""`crt gpu`: its parts, and how they are run."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from crt_lib.bench.table import Table
from crt_lib.files import InputError
from crt_lib.gpu.checks import run_checks
from crt_lib.gpu.parts import Job, Part, Unfinished, run_parts
from crt_lib.gpu.steps import run_memory, run_steps
from crt_lib.gpu.training import run_training
from crt_lib.runs.manifest import checkout_root
from crt_lib.study.analysis import judge_run

DECODED = Path("results/small/crt2")  # the run that decodes: policies and traces are stored there


def run_decode(job: Job) -> None:
    """The rows of `crt bench decode` for one text and for eight at a time, in decode.csv."""
    judged = judge_run(checkout_root() / DECODED)
    table = Table(job.out / "decode.csv", "batch")
    for batch_size in (1, 8):
        if table.find(batch_size):
            continue
        if job.left() < 2:
            raise Unfinished(f"no time was left for {batch_size} at a time")
        size = {"new_tokens": 4, "rounds": 1} if job.toy else {"new_tokens": 64, "rounds": 3}
        texts = batch_size if job.toy else max(2, batch_size)
        table.put(judged.bench(batch_size, texts, compiled=not job.toy, echo=_show, **size))


def _show(text: str) -> None:
    print(f"  {text}", flush=True)


PARTS = (  # name, share of the time, what it does
    Part("checks", 3, run_checks),
    Part("memory", 1, run_memory),
    Part("steps", 6, run_steps),
    Part("decode", 4, run_decode),
    Part("training", 8, run_training),
)


def run_gpu(
    out: Path, *, minutes: float = 9.0, rehearse: bool = False, only: Sequence[str] = ()
) -> int:
    """Run the parts that `out` does not hold; the exit status: 0 done, 1 not all.

    Raises InputError without a GPU, for an unknown part, for minutes that are not positive, and for
    a folder that holds something else.
    """
    names = [part.name for part in PARTS]
    for name in only:
        if name not in names:
            raise InputError(f"unknown part {name!r}; choose of {', '.join(names)}")
    if not minutes > 0:
        raise InputError(f"minutes is {minutes}; it must be positive")
    if not rehearse and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; --rehearse runs at toy size on the CPU")
    chosen = [part for part in PARTS if not only or part.name in only]
    words = ["crt", "gpu", "--out", str(out), "--minutes", f"{minutes:g}"]
    words += ["--rehearse"] * rehearse + [f"--only={name}" for name in only]
    done = run_parts(chosen, out, minutes=minutes, toy=rehearse, command=shlex.join(words))
    print(f"tables and manifest: {out}" if done else f"not all is done; go on with {out}")
    return int(not done)
