"""`crt gpu`, and without typer: all that is to be measured on a GPU, in one command.

    python -m crt_lib.gpu --out results/gpu [--minutes 9] [--rehearse] [--only PART]

A bare machine needs torch, numpy, transformers, accelerate, tokenizers and safetensors with what
these bring, the checkout (the part decode reads results/small/crt2), and WikiText-2 in
`CRT_DATA_ROOT` for the part training. A second call goes on where the first one stopped.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from crt_lib.bench.table import put_rows, rows_of
from crt_lib.files import InputError
from crt_lib.gpu.checks import run_checks
from crt_lib.gpu.parts import Job, Part, run_parts
from crt_lib.gpu.steps import run_memory, run_steps
from crt_lib.gpu.training import run_training
from crt_lib.runs.manifest import checkout_root
from crt_lib.study.analysis import analyse

DECODED = Path("results/small/crt2")  # the run that decodes: policies and traces are stored there


def run_decode(job: Job) -> None:
    """The rows of `crt bench decode` for one text and for eight at a time, in decode.csv."""
    judged, table = analyse(checkout_root() / DECODED), job.out / "decode.csv"
    size = {"new_tokens": 4, "rounds": 1} if job.toy else {"new_tokens": 64, "rounds": 3}
    for batch in (1, 8):
        if not rows_of(table, batch=batch):
            put_rows(table, judged.bench(batch, 2, compiled=not job.toy, **size), ["batch"])


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
    if unknown := set(only) - set(names):
        raise InputError(f"unknown part {min(unknown)!r}; choose of {', '.join(names)}")
    if not minutes > 0:
        raise InputError(f"minutes is {minutes}; it must be positive")
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; --rehearse runs at toy size on the CPU")
    chosen = [part for part in PARTS if not only or part.name in only]
    done = run_parts(chosen, out, minutes=minutes, toy=rehearse)
    print(f"tables and manifest: {out}" if done else f"not all is done; go on with {out}")
    return int(not done)


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="crt gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder; a second call goes on")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all, of this call")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on the CPU")
    only = f"only this part (repeatable): {', '.join(part.name for part in PARTS)}"
    parser.add_argument("--only", action="append", default=[], help=only)
    given = parser.parse_args(words)
    try:
        sys.exit(run_gpu(**vars(given)))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
