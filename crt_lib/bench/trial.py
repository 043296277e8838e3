"""Updates of trainings, in processes of their own: seconds by part, and the memory they take."""

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from crt_lib.bench.parts import OTHER, Clock
from crt_lib.config import AnyModelConfig, TrainConfig, make_model
from crt_lib.data import Batch, PackedWindows, PaddedLines
from crt_lib.device import DTYPES, choose_precision
from crt_lib.files import InputError
from crt_lib.loss import total_loss
from crt_lib.optim import exits_of_update, make_optimizers
from crt_lib.runs.machine import (
    end_with_parent,
    limit_memory,
    machine_memory,
    matmul_peak,
    memory_bandwidth,
    peak_memory,
)

T = TypeVar("T")
BatchOf = Callable[[int], Batch]  # by the update's number
WARM_UP = 2  # unmeasured updates
LONGEST = 60  # measured ones, however fast
AFTER = ("clipping", "optimiser")  # parts of an update that all its micro-batches share
TOO_LARGE = (
    "these settings need more memory than there is here; lower train.batch_size or train.seq_len, "
    "set train.gradient_checkpointing=true, or take a smaller model"
)


class Training:
    """A model in training on the best device, an update of one micro-batch at a time."""

    watched = False  # whether its passes are timed by part

    def __init__(self, model: AnyModelConfig, config: TrainConfig):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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

    def update(self, number: int, batch: Batch) -> dict[str, float]:
        """Seconds of update `number` by part: clipping, optimiser, and all else as OTHER.

        In a watched training, what is else by part of PARTS.
        """
        exits = exits_of_update(self.model.config.head_loops, number, self.config)
        clock = Clock(self.device.type)
        with clock.watch(self.model) if self.watched else contextlib.nullcontext():
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
            "peak_memory_bytes": peak_memory(),
            "matmul_peak": matmul_peak(self.device, self.precision),
            "bandwidth": memory_bandwidth(self.device),
        }


Side = tuple[Any, ...]  # a training that takes turns with others: its kind, model and settings


@dataclass(frozen=True)
class Trial:
    """Measured updates of one micro-batch, seconds by part, and what was said at their end."""

    updates: Sequence[dict[str, float]]
    ends: dict[str, Any]  # of `Training.ends`, at least the precision

    def part(self, *names: str) -> float:
        """Median seconds of these parts; of none: of all but clipping and optimiser."""
        sums = [
            sum(update.get(name, 0.0) for name in names or set(update) - {*AFTER})
            for update in self.updates
        ]
        return median(sums)

    def update(self, micro_batches: float = 1) -> float:
        """Seconds of an update of so many micro-batches."""
        return micro_batches * self.part() + self.part("clipping") + self.part("optimiser")


def take_turns(
    sides: Mapping[str, Side],
    batches: Mapping[str, BatchOf] | None = None,
    *,
    steps: int = LONGEST,
    seconds: float = math.inf,
    threads: int | None = None,
    gigabytes: float | None = None,
) -> dict[str, Trial]:
    """Updates of each side in its own process, after WARM_UP unmeasured ones.

    `batches`: None for random ids, since what a step costs does not depend on the text. `steps`
    updates, or fewer, but one, once `seconds` have passed. `gigabytes`: of the GPU that a process
    may have. Raises InputError as `ask`.
    """
    batches = batches or {name: partial(random_batch, *side[1:]) for name, side in sides.items()}
    with contextlib.ExitStack() as held:
        processes = {name: held.enter_context(own_process(threads, gigabytes)) for name in sides}

        def turn(number: int) -> dict[str, dict[str, float]]:
            return {
                name: ask(process, _of, sides[name], "update", number, batches[name](number))
                for name, process in processes.items()
            }

        turns, found = repeated(turn, seconds, steps), {}
        for name, process in processes.items():
            ends = ask(process, _of, sides[name], "ends")
            process.shutdown()  # or its end would disturb the peaks of the next
            found[name] = Trial([made[name] for made in turns], ends)
    return found


def repeated(update: Callable[[int], T], seconds: float, most: int = LONGEST) -> list[T]:
    """What updates by number say for about `seconds`, at least one, after WARM_UP others."""
    for number in range(WARM_UP):
        update(number)
    found: list[T] = []
    began = time.perf_counter()
    while not found or (len(found) < most and time.perf_counter() - began < seconds):
        found.append(update(WARM_UP + len(found)))
    return found


def try_random(model: AnyModelConfig, train: TrainConfig, seconds: float, **how: Any) -> Trial:
    """`take_turns` of one side, on random ids."""
    return take_turns({"": (Training, model, train)}, seconds=seconds, **how)[""]


def random_batch(model: AnyModelConfig, train: TrainConfig, number: int) -> Batch:
    """Random ids (rows, length), and those that follow."""
    generator = torch.Generator().manual_seed(number)
    shape = (train.batch_size, train.seq_len + 1)
    ids = torch.randint(model.vocab_size, shape, generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def in_order(batches: PackedWindows | PaddedLines) -> BatchOf:
    """The batches of a training by number."""
    return lambda number: batches.batch(*divmod(number, batches.steps_per_epoch))


_training = cache(lambda kind, model, train: kind(model, train))  # one a process


def _of(side: Side, method: str, *given: Any) -> Any:
    return getattr(_training(*side), method)(*given)


def own_process(threads: int | None = None, gigabytes: float | None = None) -> ProcessPoolExecutor:
    """A process for `ask`, no larger than the memory; fewer threads, or less of the GPU."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, _begin, (threads, gigabytes))


def _begin(threads: int | None, gigabytes: float | None) -> None:
    end_with_parent()
    if gigabytes:
        limit_memory(gigabytes)
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
