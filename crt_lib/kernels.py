"""What the layers are computed with: shifted sums, cheap dropout, rotary turns, recomputation.

Shapes: B rows, T positions, d features.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ShiftedSum(torch.autograd.Function):
    """A depthwise convolution: h (B, T, d) shifted, times a row of `kernels` (k, d), summed over k.

    In place, without padding: a third of the memory traffic of the sum written out.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, kernels: Tensor, offsets: list[int]) -> Tensor:
        ctx.save_for_backward(h, kernels)
        ctx.offsets = offsets
        out = torch.zeros_like(h)
        shifts = _shifts(offsets, h.shape[1])
        for kernel, (to, fro) in zip(kernels.to(h.dtype), shifts, strict=True):
            out[:, to].addcmul_(h[:, fro], kernel)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        h, kernels = ctx.saved_tensors
        by_h, by_kernels = torch.zeros_like(h), []
        shifts = _shifts(ctx.offsets, h.shape[1])
        for kernel, (to, fro) in zip(kernels.to(h.dtype), shifts, strict=True):
            here = gradient[:, to]
            by_h[:, fro].addcmul_(here, kernel)
            by_kernels.append((here * h[:, fro]).sum((0, 1), dtype=kernels.dtype))
        return by_h, torch.stack(by_kernels), None


def _shifts(offsets: list[int], T: int) -> list[tuple[slice, slice]]:
    """For each offset, the positions that are written and those that they read."""
    bounded = [max(-T, min(T, offset)) for offset in offsets]
    return [(slice(max(0, -o), T - max(0, o)), slice(max(0, o), T - max(0, -o))) for o in bounded]


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU from 16 random bits a number: a fourth of the time.

    The rate is rounded to a multiple of 2^-16. For the backward pass a seed is kept, no mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return _Dropped.apply(x, self.p)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        ctx.rate, ctx.seed = rate, int(torch.randint(2**62, ()))
        return _dropped(x, rate, ctx.seed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _dropped(gradient, ctx.rate, ctx.seed), None


def _dropped(x: Tensor, rate: float, seed: int) -> Tensor:
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    keep = (bits >= round(rate * 2**16) - 2**15).view(torch.uint8)
    return keep.to(x.dtype).mul_(1 / (1 - rate)).mul_(x)


def turns(positions: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles t / 10,000^(2i/D) of positions t (..., T): (..., T, D/2)."""
    rates = 10_000 ** (-torch.arange(0, D, 2, device=positions.device, dtype=dtype) / D)
    angles = positions[..., None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: feature pair (i, i + D/2) of each position turned by the angles of `turns`.

    x (..., T, D), D even, and what broadcasts to (..., T, D/2); the products of two rotated vectors
    depend on their distance alone.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Recomputing(nn.Module):
    """A module whose activations, if it `recomputes`, are computed again in the backward pass.

    Subclasses define `compute`. Nothing is computed again that the backward pass does not read.
    """

    recomputes = False
    compute: Callable[..., Tensor]

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return recomputed(self, self.compute, x, *rest)
        return self.compute(x, *rest)


def recomputed(module: nn.Module, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, a part of `module`, keeping no activations for the backward pass."""
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        # batch norms must not count the same batch a second time
        context_fn=lambda: (contextlib.nullcontext(), frozen_running_statistics(module)),
    )


class TimeBatchNorm(nn.BatchNorm1d):
    """Batch norm with one statistic a feature over all rows and positions: it leaks in training."""

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@contextlib.contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which the batch norms of `model` do not count a batch."""
    norms = [module for module in model.modules() if isinstance(module, TimeBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
