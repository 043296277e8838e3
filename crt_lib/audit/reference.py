"""The model written plainly: every formula of the paper and of the options, nothing fused.

The yardstick of the tests and of the training benchmark. It shares no code with `crt_lib.model`:
it reads a state dict by name and computes, so that the two can only agree by both being right.
"""

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from crt_lib.config import ModelConfig

EPS = 1e-5  # of every norm


def reference_logits(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    ids: Tensor,
    *,
    training: bool = False,
    checkpoint: bool = False,
) -> dict[int, Tensor]:
    """Logits (B, T, V) at every loop with a head, for token ids (B, T); eq. 1 to 3, section 3.1.

    `state` is `CRT.state_dict()`, or its parameters and buffers when gradients are wanted.
    `training` turns on dropout and batch statistics (running ones are read, never written);
    `checkpoint` recomputes each application of a block in the backward pass instead of keeping it.
    """
    net = _Plain(state, config, training)
    block = partial(recompute, net.block, use_reentrant=False) if checkpoint else net.block
    embedded = z = net.embedding(ids)  # (B, T, d)
    for i in range(config.n_prelude):
        z = block(f"prelude.{i}", z)
    logits = {}
    for loop in range(1, config.n_loops + 1):
        x = z + state["loop_encoding"][loop - 1]  # eq. 3
        if config.injection:
            x = x + state["injection"] * embedded
        z = block("block", x)
        if loop in config.head_loops:
            logits[loop] = net.head(loop, z)
    return logits


def reference_loss(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    ids: Tensor,
    targets: Tensor,
    aux_weight: float,
    **how: bool,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of eq. 5 and {loop: mean cross-entropy in nats, eq. 4}, through full logits.

    `targets` (B, T) hold the next token of each position, -100 where nothing is scored; `how` as
    for `reference_logits`. Without intermediate heads the total is the final loss.
    """
    losses = {
        loop: F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        for loop, scores in reference_logits(state, config, ids, **how).items()
    }
    final = losses[config.n_loops]
    if not config.exit_loops:
        return final, losses
    auxiliary = sum(losses[loop] for loop in config.exit_loops) / len(config.exit_loops)
    return (1 - aux_weight) * final + aux_weight * auxiliary, losses


class _Plain:
    """The parts of the model as formulas over `state`; a `name` is a prefix of its keys."""

    def __init__(self, state: Mapping[str, Tensor], config: ModelConfig, training: bool) -> None:
        self.state, self.config, self.training = state, config, training

    def embedding(self, ids: Tensor) -> Tensor:
        """Eq. 1: (B, T) ids to (B, T, d), with the learned positions where there are any."""
        config = self.config
        h = self.state["embed.tokens.weight"][ids]
        if config.embedding_width != config.d_model:
            h = self.linear("embed.proj", h)
        h = self.trm("embed", config.n_embed_cycles, h)
        if config.positions == "learned":
            h = h + self.state["positions"][: ids.shape[1]]
        return self.dropout(h, config.embed_dropout)

    def block(self, name: str, x: Tensor) -> Tensor:
        """The block of eq. 3: attention, then TRM, each added; "post" normalises the two sums."""
        attention, trm, cycles = f"{name}.attention", f"{name}.trm", self.config.n_cycles
        if self.config.residual == "pre":
            read = self.norm(f"{name}.norm1", x)
            return self.trm(trm, cycles, x + self.dropout(self.attention(attention, read)))
        x = self.norm(f"{name}.norm1", x + self.dropout(self.attention(attention, x)))
        return self.norm(f"{name}.norm2", x + self.trm(trm, cycles, x))

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Causal multi-head attention with its (B, heads, T, T) scores written out."""
        config = self.config
        q, k, v = (
            part.unflatten(-1, (config.n_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        )
        if config.positions == "rotary":
            q, k = self.turned(q), self.turned(k)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, T, T)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        weights = self.dropout(weights, config.attention_dropout)
        return self.linear(f"{name}.out", (weights @ v).transpose(1, 2).flatten(2))

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions of x (B, heads, T, D).

        Features p and p + D/2 of position t are one complex number, times exp(i t 10,000^(-2p/D)).
        """
        length, half = x.shape[-2], x.shape[-1] // 2
        wide = x if x.dtype == torch.float64 else x.float()  # bfloat16 has no complex numbers
        t, p = (torch.arange(n, dtype=torch.float64, device=x.device) for n in (length, half))
        turns = torch.exp(1j * t[:, None] * 10_000 ** (-p / half))  # (T, D/2)
        numbers = torch.complex(wide[..., :half], wide[..., half:])  # (B, heads, T, D/2)
        turned = numbers * turns.to(numbers.dtype)
        return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)

    def trm(self, name: str, n_cycles: int, h: Tensor) -> Tensor:
        """`n_cycles` applications of eq. 2; the residual stream is inside it."""
        config = self.config
        for i in range(n_cycles):
            cycle = f"{name}.cycles.{0 if config.share_cycle_weights else i}"
            h = h + self.dropout(self.cycle(cycle, config.dilations[i % len(config.dilations)], h))
        return h

    def cycle(self, name: str, dilation: int, h: Tensor) -> Tensor:
        """What one cycle adds to `h`, before dropout: eq. 2 and the variants of Table 3."""
        config = self.config
        if config.conv_after_norm:
            h = self.convolution(f"{name}.conv", dilation, self.norm(f"{name}.norm", h))
        else:
            h = self.norm(f"{name}.norm", self.convolution(f"{name}.conv", dilation, h))
        if config.trm in ("conv", "depthwise"):
            return h
        h = self.linear(f"{name}.up", h)
        if config.activation == "swiglu":  # the gate, then as many values
            width = 2 * (config.mlp_ratio * config.d_model) // 3
            h = F.silu(h[..., :width]) * h[..., width:]
        else:
            h = F.gelu(h)
        return self.linear(f"{name}.down", h)

    def convolution(self, name: str, dilation: int, h: Tensor) -> Tensor:
        """For each kernel tap `h` is shifted to where that tap reads, zeros beyond the ends."""
        config, length = self.config, h.shape[1]
        if config.trm == "linear":
            return h
        reach = (config.kernel_size - 1) * dilation
        left = reach if config.causal else (config.kernel_size // 2) * dilation
        padded = F.pad(h, (0, 0, left, reach - left))  # (B, T + reach, d)
        starts = (j * dilation for j in range(config.kernel_size))
        taps = [*enumerate(padded[:, start : start + length] for start in starts)]
        if config.trm in ("conv", "conv_linear"):
            weight = self.state[f"{name}.full.weight"]  # (d out, d in, kernel)
            mixed = sum(F.linear(tap, weight[:, :, j]) for j, tap in taps)
            return self.dropout(F.gelu(cast(Tensor, mixed)))
        weight = self.state[f"{name}.depthwise.weight"]  # (d, 1, kernel)
        mixed = cast(Tensor, sum(weight[:, 0, j] * tap for j, tap in taps))
        if not config.pointwise:
            return mixed
        return self.dropout(self.linear(f"{name}.pointwise", F.gelu(mixed)))

    def norm(self, name: str, x: Tensor) -> Tensor:
        kind, state = self.config.norm, self.state
        if kind == "none":
            return x
        weight = state[f"{name}.weight"]
        if kind == "rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
        if kind == "batch" and not self.training:
            x, variance = x - state[f"{name}.running_mean"], state[f"{name}.running_var"]
        else:
            over = -1 if kind == "layer" else (0, 1)
            x = x - x.mean(over, keepdim=True)
            variance = x.square().mean(over, keepdim=True)
        return x * torch.rsqrt(variance + EPS) * weight + state[f"{name}.bias"]

    def head(self, loop: int, z: Tensor) -> Tensor:
        """Logits (B, T, V) of the head after `loop`."""
        config, sharing = self.config, self.config.head_sharing
        if config.exit_norm:
            z = self.norm(f"exit_norms.{loop}", z)
        if sharing == "tied":
            if config.embedding_width != config.d_model:
                z = self.linear(f"heads.{loop}", z)
            return F.linear(z, self.state["embed.tokens.weight"])
        if sharing == "separate":
            return self.linear(f"heads.{loop}", z)
        return self.linear("heads.final" if loop == config.n_loops else "heads.aux", z)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def dropout(self, x: Tensor, rate: float | None = None) -> Tensor:
        """While training, at `rate` or at the general rate of the configuration."""
        return F.dropout(x, self.config.dropout if rate is None else rate, self.training)
