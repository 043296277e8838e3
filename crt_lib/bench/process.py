"""A process of its own, so that its peak memory is its own, and what it needs too much is told."""

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from crt_lib.files import InputError
from crt_lib.runs.machine import end_with_parent, machine_memory

T = TypeVar("T")
TOO_LARGE = (
    "these settings need more memory than there is here; lower train.batch_size or train.seq_len, "
    "set train.gradient_checkpointing=true, or take a smaller model"
)


def own_process(threads: int | None = None) -> ProcessPoolExecutor:
    """A process for `ask`, no larger than the memory, which may have fewer threads."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (threads,))


def _begin(threads: int | None) -> None:
    end_with_parent()
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        return  # its driver maps more than it holds
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (machine_memory(),) * 2)


def ask(process: ProcessPoolExecutor, function: Callable[..., T], *given: Any) -> T:
    """`function(*given)` in `process`; InputError where that needs more memory than there is."""
    try:
        return process.submit(function, *given).result()
    except (MemoryError, RuntimeError) as error:  # of torch, or of a killed process
        if isinstance(error, BrokenProcessPool) or "memory" in repr(error).lower():
            raise InputError(TOO_LARGE) from error
        raise
