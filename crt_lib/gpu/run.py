"""`crt gpu`: its parts, and how they are run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from crt_lib.files import InputError
from crt_lib.gpu.checks import run_checks
from crt_lib.gpu.parts import Part, run_parts
from crt_lib.gpu.steps import run_decode, run_memory, run_steps
from crt_lib.gpu.training import run_training

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
    if not rehearse and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; --rehearse runs at toy size on the CPU")
    chosen = [part for part in PARTS if not only or part.name in only]
    done = run_parts(chosen, out, minutes=minutes, toy=rehearse)
    print(f"tables and manifest: {out}" if done else f"not all is done; go on with {out}")
    return int(not done)
