"""The machine: its peak, its memory and limits, its processes, and what a training used of it."""

import contextlib
import multiprocessing
import os
import platform
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from crt_lib.audit.accounting import multiply_adds
from crt_lib.config import AnyModelConfig, TrainConfig
from crt_lib.device import DTYPES
from crt_lib.files import InputError
from crt_lib.runs.manifest import of_proc, run_environment

GPU_PRODUCT = 8192  # matrices that keep a GPU at work for long beside what a launch takes


def matmul_peak(device: torch.device, precision: str, size: int = 2048) -> float:
    """FLOP/s of the fastest products of (size, size) matrices; larger ones on a GPU."""
    size = GPU_PRODUCT if device.type == "cuda" else size
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    return 2 * size**3 / _fastest("a @ b", a=a, b=b)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of the fastest copies of 256 MiB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest("a.copy_(b)", a=target, b=source)


def _fastest(work: str, **tensors: Tensor) -> float:
    """Seconds of the fastest calls in half a second, or of one that takes longer."""
    timer = Timer(work, globals=tensors, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)


def wait(device: str) -> None:
    """Until a GPU has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine_memory() -> int:
    """Bytes of memory that this process may come to hold: the machine's, or its cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return total


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes: on the GPU if it used one, else RSS.

    On Linux getrusage would not do: a process starts with what its parent held.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if held := of_proc("/proc/self/status", "VmHWM"):
        return int(held.split()[0]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(gigabytes: float) -> None:
    """Let this process have no more of the GPU: what needs more fails as on a smaller card.

    Raises InputError without a GPU, and for a limit that is not positive or above what it has.
    """
    if not torch.cuda.is_available():
        raise InputError("a limit on the GPU's memory needs a GPU")
    total = torch.cuda.get_device_properties(0).total_memory
    if not 0 < gigabytes * 1e9 <= total:
        raise InputError(f"a limit of {gigabytes} GB is not within the GPU's {total / 1e9:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)


def measured_on(threads: int | None = None) -> dict[str, Any]:
    """What a row of a benchmark says of where it was measured: device, ISA and threads."""
    here = run_environment()
    return {name: here[name] for name in ("device", "isa")} | {
        "threads": threads or torch.get_num_threads()
    }


def utilisation(
    model: AnyModelConfig, train: TrainConfig, seconds: list[float], peak: float
) -> float:
    """MFU of a training: the share of `peak` FLOP/s that its median update used.

    `seconds`: elapsed after each update. Six FLOPs a multiply-add of the forward pass over all
    positions, padding included, recomputation excluded; with one exit an update, one head and every
    loop, so that it is at most that.
    """
    heads = model.head_loops if train.exits_trained == "all" else model.head_loops[-1:]
    a_position = 6 * sum(multiply_adds(model, train.seq_len, heads).values())
    positions = train.seq_len * train.batch_size * train.grad_accum
    update = float(np.median(np.diff(seconds, prepend=0.0)))
    return a_position * positions / update / peak


def end_with_parent() -> None:
    """In a worker: end it as soon as the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
