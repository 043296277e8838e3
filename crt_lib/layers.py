"""The layers of a CRT block: dilated convolution, attention and norms.

Shapes: B rows, T positions, d = d_model.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import ModelConfig
from crt_lib.kernels import Dropout, Recomputing, ShiftedSum, TimeBatchNorm, rotate, turns

if TYPE_CHECKING:
    from crt_lib.cached.memory import ConvMemory, LayerMemory


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

    def forward(self, h: Tensor, dilation: int, memory: "ConvMemory | None" = None) -> Tensor:
        """(B, T, d) to (B, T, d); with `memory`, after the positions that it holds."""
        if self.is_depthwise:
            h = self._depthwise(h, dilation, memory)
            return self.dropout(self.pointwise(F.gelu(h))) if self.has_pointwise else h
        taps = self._taps(h, dilation, memory)
        weight = self.full.weight.permute(0, 2, 1).flatten(1)  # (d, k * d)
        return self.dropout(F.gelu(F.linear(torch.cat(taps, dim=-1), weight)))

    def _depthwise(self, h: Tensor, dilation: int, memory: "ConvMemory | None") -> Tensor:
        kernels = self.depthwise.weight[:, 0].T  # (k, d)
        if memory is not None and h.shape[1] == 1:  # fewer, larger operations for a single token
            return (memory.extend(h)[:, ::dilation] * kernels).sum(1, keepdim=True)
        if memory is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return ShiftedSum.apply(h, kernels, self._offsets(dilation))
        # k shifted multiply-adds stay in (B, T, d): no transposes, and torch.compile fuses them
        taps = self._taps(h, dilation, memory)
        return sum(tap * kernel for tap, kernel in zip(taps, kernels, strict=True))

    def _offsets(self, dilation: int) -> list[int]:
        """Where each tap reads, in positions after the one it is for."""
        k = self.kernel_size
        left = (k - 1 if self.causal else k // 2) * dilation
        return [i * dilation - left for i in range(k)]

    def _taps(self, h: Tensor, dilation: int, memory: "ConvMemory | None") -> list[Tensor]:
        """The k inputs of each position's convolution, zero outside the row; k x (B, T, d)."""
        k, T = self.kernel_size, h.shape[1]
        if memory is not None:
            padded = memory.extend(h)  # (B, (k - 1) * dilation + T, d)
        else:
            left = -self._offsets(dilation)[0]
            padded = F.pad(h, (0, 0, left, (k - 1) * dilation - left))
        return [padded[:, i * dilation : i * dilation + T] for i in range(k)]


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

    def compute(self, x: Tensor, memory: "LayerMemory | None" = None) -> Tensor:
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
