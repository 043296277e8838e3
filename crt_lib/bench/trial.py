"""Updates of a training: their seconds by part, and the memory that they take."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from crt_lib.bench.parts import OTHER, Clock
from crt_lib.config import AnyModelConfig, TrainConfig, make_model
from crt_lib.data import Batch
from crt_lib.device import DTYPES, choose_precision
from crt_lib.loss import total_loss
from crt_lib.optim import exits_of_update, make_optimizers
from crt_lib.runs.machine import matmul_peak, memory_bandwidth
from crt_lib.runs.manifest import peak_memory

LONGEST = 60  # updates of a trial, however fast


class Training:
    """A model in training on the best device, an update of one micro-batch at a time."""

    def __init__(self, model: AnyModelConfig, config: TrainConfig):
        self.config = config
        self.device = best_device()
        self.precision = choose_precision(
            config.precision, self.device, model.d_model, config.optimizer
        ).name
        torch.manual_seed(config.seed)
        self.model: Any = make_model(model).to(self.device).train()
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, config)
        if config.compile:
            self.model.compile_block()

    def loss(self, inputs: Tensor, targets: Tensor, exits: tuple[int, ...]) -> Tensor:
        """Eq. 5 of these exits."""
        with torch.autocast(
            self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
        ):
            return total_loss(self.model(inputs, exits, targets=targets), self.config.aux_weight)

    def update(self, number: int, batch: Batch, watched: bool = False) -> dict[str, float]:
        """Seconds of update `number` by part: clipping, optimiser, and all else as OTHER.

        `watched`: what is else by part of PARTS.
        """
        exits = exits_of_update(self.model.config.head_loops, number, self.config)
        clock = Clock(self.device.type)
        with clock.watch(self.model) if watched else contextlib.nullcontext():
            inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
            self.loss(inputs, targets, exits).backward()
            clock.switch("clipping")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        clock.switch("optimiser")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        clock.switch(OTHER)
        return dict(clock.seconds)

    def ends(self) -> dict[str, Any]:
        """Precision, parameters and the process's peak memory; then the device's peaks."""
        return {
            "precision": self.precision,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "memory": peak_memory(),
            "matmul_peak": matmul_peak(self.device, DTYPES[self.precision]),
            "bandwidth": memory_bandwidth(self.device),
        }


@dataclass(frozen=True)
class Trial:
    """Medians in seconds: of a micro-batch, of clipping, of the optimizers' steps.

    `updates`: how many were measured. `peak_memory` in bytes, of the process so far.
    """

    precision: str
    micro_batch: float
    clipping: float
    optimizer: float
    updates: int
    peak_memory: int

    def update(self, grad_accum: int) -> float:
        """Seconds of an update of so many micro-batches."""
        return grad_accum * self.micro_batch + self.clipping + self.optimizer


def measure(training: Training, batch_of: Callable[[int], Batch], seconds: float) -> Trial:
    """Updates for about `seconds`, at least one after one unmeasured, on batches by number."""
    training.update(0, batch_of(0))
    found: list[dict[str, float]] = []
    began = time.perf_counter()
    while not found or (len(found) < LONGEST and time.perf_counter() - began < seconds):
        number = len(found) + 1
        found.append(training.update(number, batch_of(number)))
    micro_batch, clipping, optimizer = (
        median(update[part] for update in found) for part in (OTHER, "clipping", "optimiser")
    )
    held = peak_memory()
    return Trial(training.precision, micro_batch, clipping, optimizer, len(found), held)


def measure_on_random(model: AnyModelConfig, train: TrainConfig, seconds: float) -> Trial:
    """The same on random ids: what a step costs does not depend on the text."""
    return measure(Training(model, train), partial(random_batch, model, train), seconds)


def random_batch(model: AnyModelConfig, train: TrainConfig, number: int) -> Batch:
    """Random ids (rows, length), and those that follow."""
    generator = torch.Generator().manual_seed(number)
    shape = (train.batch_size, train.seq_len + 1)
    ids = torch.randint(model.vocab_size, shape, generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
