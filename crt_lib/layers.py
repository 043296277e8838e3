"""The layers of a CRT block: dilated convolution, attention, rotary positions, norms.

Shapes: B rows, T positions, d = d_model.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import ModelConfig
from crt_lib.memory import ConvMemory, LayerMemory


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
        self.dropout = nn.Dropout(config.dropout)

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
        # k shifted multiply-adds stay in (B, T, d): no transposes, and torch.compile fuses them
        taps = self._taps(h, dilation, memory)
        return sum(tap * kernel for tap, kernel in zip(taps, kernels, strict=True))

    def _taps(self, h: Tensor, dilation: int, memory: ConvMemory | None) -> list[Tensor]:
        """The k inputs of each position's convolution, zero outside the row; k x (B, T, d)."""
        k, T = self.kernel_size, h.shape[1]
        if memory is not None:
            padded = memory.extend(h)  # (B, (k - 1) * dilation + T, d)
        else:
            left = (k - 1) * dilation if self.causal else (k // 2) * dilation
            padded = F.pad(h, (0, 0, left, (k - 1) * dilation - left))
        return [padded[:, i * dilation : i * dilation + T] for i in range(k)]


class Attention(nn.Module):
    """Causal multi-head attention without biases, scale 1 / sqrt(head_dim)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        given = config.attention_dropout
        self.attention_dropout = config.dropout if given is None else given
        self.rotary = config.positions == "rotary"
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
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
        else:
            dropout = self.attention_dropout if self.training else 0.0
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
