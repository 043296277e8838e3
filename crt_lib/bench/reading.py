"""A text read with exits, a token a step, each step timed; the next token is the text's own."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.exits.decode import best
from crt_lib.exits.policy import Loop, Policy, leave, nats_of
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT
from crt_lib.runs.machine import wait


@dataclass(frozen=True)
class Told(Policy):
    """A policy of a `Step` that asks nothing: each token leaves after its own of `loops` (B, T)."""

    loops: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    @property
    def asks(self) -> bool:
        """Whether exits before the last are asked."""
        return True

    def passes(self, loop: Loop) -> Tensor | bool:
        """Which tokens (B,) leave after this exit loop."""
        assert isinstance(loop.run, Step)
        leaving = self.loops[:, loop.run.at] <= loop.number
        return bool(leaving[0]) if (leaving == leaving[0]).all() else leaving


@dataclass(frozen=True)
class Reading:
    """A text (B, T) read by a policy: nats and exit loops (B, T), and seconds of each step (T,)."""

    nats: np.ndarray
    loops: np.ndarray
    seconds: np.ndarray


class Reader:
    """Reads texts of up to `length` tokens, `rows` at a time, by any policy."""

    def __init__(self, model: CRT, rows: int, length: int):
        self.step = Step(model, Memory(model.config, rows, length, model.loop_encoding))

    @torch.inference_mode()
    def read(self, inputs: Tensor, targets: Tensor, policy: Policy) -> Reading:
        """Read inputs (B, T) from their beginning.

        A step is timed up to the choice of its most probable token; what scores it is not.
        """
        self.step.memory.truncate(0)
        logits, loops, seconds = [], [], []
        for ids in inputs.unbind(1):
            begun = time.perf_counter()
            left = leave(self.step, ids, policy)
            best(left.logits)
            wait(inputs.device.type)
            seconds.append(time.perf_counter() - begun)
            logits.append(left.logits)
            loops.append(left.loops)
        log_p = at_least_float32(torch.stack(logits, 1)).log_softmax(-1)
        nats = nats_of(log_p, targets).double().cpu().numpy()
        return Reading(nats, torch.stack(loops, 1).cpu().numpy(), np.array(seconds))


@torch.inference_mode()
def first_as_good(model: CRT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of each token (B, T) the first exit whose loss in a full pass is not above the last one's."""
    exits = model.config.head_loops
    losses = torch.stack(list(model(inputs, targets=targets, reduction="none").values()))
    as_good = losses <= losses[-1]
    return torch.tensor(exits, device=losses.device)[as_good.float().argmax(0)]


def mixed(
    exits: Sequence[int], depth: float, shape: Sequence[int], rng: np.random.Generator
) -> Tensor:
    """Exits of tokens (B, T): by chance one of the two neighbours that have this mean depth."""
    low, high = next(pair for pair in itertools.pairwise(exits) if depth <= pair[1])
    chance = np.clip((high - depth) / (high - low), 0, 1)
    return torch.from_numpy(np.where(rng.random(tuple(shape)) < chance, low, high))
