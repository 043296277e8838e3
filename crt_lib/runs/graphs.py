"""Losses and gradients from CUDA graphs: a small model's update is mostly launching kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from crt_lib.config import TrainConfig
from crt_lib.device import DTYPES, Precision


def graphs_fit(config: TrainConfig) -> bool:
    """Whether this is a training that `GraphedLosses` can serve, on this machine.

    Of several micro-batches the second pass would overwrite the gradients of the first.
    """
    alone = config.grad_accum == 1 and not (config.compile or config.gradient_checkpointing)
    return alone and torch.cuda.is_available()


class GraphedLosses:
    """A model's losses as `CRT.forward` gives them, each choice of exits captured at first use.

    The forward pass is then one launch and the backward pass another. Losses and gradients are
    overwritten by the next pass of the same exits. Batches are of one shape.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self._captured: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids: Tensor, exits: tuple[int, ...], targets: Tensor) -> dict[int, Tensor]:
        """{loop: loss}, scalars in nats."""
        if exits not in self._captured:
            plain = self.plain(exits)
            # as at every other use: no random number is drawn for the capture, no cast is kept
            with torch.random.fork_rng(), torch.autocast("cuda", enabled=False):
                self._captured[exits] = torch.cuda.make_graphed_callables(
                    plain, (ids.clone(), targets.clone()), allow_unused_input=True
                )
        return dict(zip(exits, self._captured[exits](ids, targets), strict=True))

    def plain(self, exits: tuple[int, ...]) -> nn.Module:
        """What is captured: (ids, targets) to the losses of these exits, a tuple."""
        return _Losses(self.model, exits, self.precision)


class _Losses(nn.Module):
    def __init__(self, model: nn.Module, exits: tuple[int, ...], precision: Precision):
        super().__init__()
        self.model, self.exits, self.precision = model, exits, precision

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        name = self.precision.name
        dtype = torch.bfloat16 if name == "fp32" else DTYPES[name]
        with torch.autocast("cuda", dtype, enabled=name != "fp32", cache_enabled=False):
            # the class's own: the instance's may be wrapped by accelerate
            found = type(self.model).forward(self.model, ids, self.exits, targets=targets)
        return tuple(found[loop] for loop in self.exits)
