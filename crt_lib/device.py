"""What the device can do, how much of it a training used, and a limit on its memory."""

import time

import numpy as np
import torch

from crt_lib.accounting import multiply_adds
from crt_lib.config import GPT2Config, ModelConfig, TrainConfig
from crt_lib.files import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


GPU_PRODUCT = 8192  # matrices that keep a GPU at work for long beside what a launch takes


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the fastest of six products of (size, size) matrices; larger ones on a GPU."""
    size = GPU_PRODUCT if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        wait(device.type)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def wait(device: str) -> None:
    """Until a GPU has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def utilisation(
    model: ModelConfig | GPT2Config, train: TrainConfig, seconds: list[float], peak: float
) -> float:
    """MFU of a training: the share of `peak` FLOP/s that its median update used.

    `seconds`: elapsed after each update. Six FLOPs a multiply-add of the forward pass over all
    positions, padding included, recomputation excluded; with one exit an update, one head (the
    loops that such an update leaves out are counted, so it is at most that).
    """
    heads = model.head_loops if train.exits_trained == "all" else model.head_loops[-1:]
    a_position = 6 * sum(multiply_adds(model, train.seq_len, heads).values())
    positions = train.seq_len * train.batch_size * train.grad_accum
    update = float(np.median(np.diff(seconds, prepend=0.0)))
    return a_position * positions / update / peak


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
