"""The layers of a CRT block: dilated convolution, attention, rotary positions, norms, dropout.

Shapes: B rows, T positions, d = d_model.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crt_lib.caches import ConvMemory, LayerMemory
from crt_lib.config import ModelConfig


class DilatedConv(nn.Module):
    """Dilated convolution over time -> gelu -> (depthwise only) pointwise -> dropout (eq. 2).

    `depthwise`: one kernel a channel, then a pointwise convolution with bias mixes the channels.
    Otherwise a full convolution, which mixes them itself. Neither convolution over time has a bias.
    Without `pointwise`, the depthwise convolution alone.
    """

    def __init__(self, config: ModelConfig, depthwise: bool):
        super().__init__()
        d, k = config.d_model, config.kernel_size
        self.kernel_size, self.causal = k, config.causal
        self.is_depthwise, self.has_pointwise = depthwise, depthwise and config.pointwise
        if depthwise:
            self.depthwise = nn.Conv1d(d, d, k, groups=d, bias=False)
            if config.pointwise:
                self.pointwise = nn.Linear(d, d)
        else:
            self.full = nn.Conv1d(d, d, k, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, h: Tensor, dilation: int, memory: ConvMemory | None = None) -> Tensor:
        """(B, T, d) to (B, T, d); with `memory`, after the positions that it holds."""
        if self.is_depthwise:
            h = self._depthwise(h, dilation, memory)
            return self.dropout(self.pointwise(F.gelu(h))) if self.has_pointwise else h
        taps = self._taps(h, dilation, memory)
        weight = self.full.weight.permute(0, 2, 1).flatten(1)  # (d, k * d)
        return self.dropout(F.gelu(F.linear(torch.cat(taps, dim=-1), weight)))

    def _depthwise(self, h: Tensor, dilation: int, memory: ConvMemory | None) -> Tensor:
        kernels = self.depthwise.weight[:, 0].T  # (k, d)
        if memory is not None and h.shape[1] == 1:  # fewer, larger operations for a single token
            return (memory.extend(h)[:, ::dilation] * kernels).sum(1, keepdim=True)
        if memory is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _ShiftedSum.apply(h, kernels, self._offsets(dilation))
        # k shifted multiply-adds stay in (B, T, d): no transposes, and torch.compile fuses them
        taps = self._taps(h, dilation, memory)
        return sum(tap * kernel for tap, kernel in zip(taps, kernels, strict=True))

    def _offsets(self, dilation: int) -> list[int]:
        """Where each tap reads, in positions after the one it is for."""
        k = self.kernel_size
        left = (k - 1 if self.causal else k // 2) * dilation
        return [i * dilation - left for i in range(k)]

    def _taps(self, h: Tensor, dilation: int, memory: ConvMemory | None) -> list[Tensor]:
        """The k inputs of each position's convolution, zero outside the row; k x (B, T, d)."""
        k, T = self.kernel_size, h.shape[1]
        if memory is not None:
            padded = memory.extend(h)  # (B, (k - 1) * dilation + T, d)
        else:
            left = -self._offsets(dilation)[0]
            padded = F.pad(h, (0, 0, left, (k - 1) * dilation - left))
        return [padded[:, i * dilation : i * dilation + T] for i in range(k)]


class _ShiftedSum(torch.autograd.Function):
    """A depthwise convolution: h (B, T, d) shifted, times a row of `kernels` (k, d), summed over k.

    In place, without padding: a third of the memory traffic of the sum written out.
    """

    @staticmethod
    def forward(ctx, h, kernels, offsets):
        ctx.save_for_backward(h, kernels)
        ctx.offsets = offsets
        out = torch.zeros_like(h)
        for kernel, (to, fro) in zip(
            kernels.to(h.dtype), _shifts(offsets, h.shape[1]), strict=True
        ):
            out[:, to].addcmul_(h[:, fro], kernel)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
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
    def forward(ctx, x, rate):
        ctx.rate, ctx.seed = rate, int(torch.randint(2**62, ()))
        return _dropped(x, rate, ctx.seed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _dropped(gradient, ctx.rate, ctx.seed), None


def _dropped(x: Tensor, rate: float, seed: int) -> Tensor:
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    keep = (bits >= round(rate * 2**16) - 2**15).view(torch.uint8)
    return keep.to(x.dtype).mul_(1 / (1 - rate)).mul_(x)


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


class Attention(Recomputing):
    """Causal multi-head attention without biases, scale 1 / sqrt(head_dim)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        given = config.attention_dropout
        self.dropout = Dropout(config.dropout if given is None else given)
        self.rotary = config.positions == "rotary"
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def compute(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
        """(B, T, d) to (B, T, d); with `memory`, after the positions that it holds."""
        B, T, d = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_heads, d // self.n_heads)
        heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, n_heads, T, head_dim)
        q, k, v = heads
        if self.rotary:
            width = torch.promote_types(x.dtype, torch.float32), heads.shape[-1]
            if memory is None:
                by = turns(torch.arange(T, device=x.device), *width)
            else:
                by = memory.shared("turns", T, lambda: turns(memory.positions(T), *width))
            q, k = rotate(heads[:2], *by)
        if memory is not None:
            k, v, mask = memory.extend(k, v)  # every position so far
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.training and self.dropout.p and x.device.type == "cpu":
            # the kernel has no dropout of its own on a CPU, and torch's is slow there
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, n_heads, T, T)
            y = self.dropout(scores.masked_fill(future, -torch.inf).softmax(-1)) @ v
        else:
            dropout = self.dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


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


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of `config.norm` over the d features; `batch` is over (B, T) positions."""
    d = config.d_model
    match config.norm:
        case "layer":
            return nn.LayerNorm(d)
        case "rms":
            return nn.RMSNorm(d, eps=1e-5)
        case "batch":
            return TimeBatchNorm(d)
    return nn.Identity()


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
