"""The device at hand: the precision it is fast at, its compiler, and how it was launched."""

import functools
import os
import time
from typing import NamedTuple

import torch

from crt_lib.files import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST = 1.2  # times float32's speed from which bf16 is worth its casts
WIDE = 320  # width times bf16's speed from which a CPU gains more by the products than casts cost


class Precision(NamedTuple):
    """A precision of training, a key of DTYPES, and why it was chosen."""

    name: str
    why: str


def choose_precision(
    precision: str, device: torch.device, d_model: int, optimizer: str = "adamw"
) -> Precision:
    """What `precision` (auto or a key of DTYPES) means for a model of width `d_model` on `device`.

    `auto` is bf16 where its products are measured to be faster than float32's, on a CPU only where
    that speed times `d_model` is at least WIDE (160 features at twice the speed); on a GPU without
    bf16 fp16, for muon fp32. Raises InputError for fp16 on a CPU, and with muon.
    """
    if precision == "fp16" and optimizer == "muon":
        raise InputError("fp16 scales the loss, for one optimizer; muon is two: use fp32 or bf16")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("this CPU trains in fp32 or bf16; fp16 needs a GPU")
    if precision == "fp32":
        return Precision(precision, "asked for")
    speed = bf16_speed(device.type)
    measured = f"bf16 products run {speed:.2g} times as fast as float32's here"
    if precision != "auto":
        return Precision(precision, "asked for" + (f"; {measured}" if precision == "bf16" else ""))
    if bf16_is_fast(device):
        if device.type != "cpu" or d_model * speed >= WIDE:
            return Precision("bf16", f"auto: {measured}")
        return Precision("fp32", f"auto: {measured}, too little for {d_model} features")
    name = "fp16" if device.type == "cuda" and optimizer != "muon" else "fp32"
    return Precision(name, f"auto: {measured}")


def check_launch() -> None:
    """Raise InputError where `accelerate launch` began one process of several, without a GPU."""
    asked = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if asked and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "accelerate started one process where several were asked for; without a GPU add "
            "--multi_gpu, which starts them all, and they share the work through gloo"
        )


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile would find no C++ compiler for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        if device.type == "cpu":
            get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "train.compile needs a C++ compiler: install one, name it in CXX, or train without"
        ) from error


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 matrix products are worth their casts on `device`."""
    return bf16_speed(device.type) >= FAST


@functools.cache
def bf16_speed(kind: str) -> float:
    """Speed of bf16 matrix products against float32's on a device of this kind.

    Measured once a process, in less than a fifth of a second: a CPU without such instructions
    emulates them, a hundred times slower, and its name does not tell.
    """
    device = torch.device(kind)
    best: dict[torch.dtype, float] = {}
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    for _ in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            size = 2048 if kind == "cuda" else 256
            a = torch.ones(size, size, device=device, dtype=dtype)
            a @ a
            wait()
            started = time.perf_counter()
            a @ a
            wait()
            seconds = time.perf_counter() - started
            best[dtype] = min(best.get(dtype, seconds), seconds)
    return best[torch.float32] / best[torch.bfloat16]
