"""The model written plainly: every formula as in the paper, nothing fused.

The yardstick of the tests and of the training benchmark. It shares no code with `crt_lib.model`:
it reads a state dict by name and computes, so that the two can only agree by both being right.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from crt_lib.config import ModelConfig

EPS = 1e-5  # of every norm
IGNORED = -100  # a target that is not scored


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
    `checkpoint` recomputes each loop's block in the backward pass instead of keeping it.
    """
    net = _Plain(state, config, training)
    z = net.embedding(ids)  # (B, T, d)
    logits = {}
    for loop in range(1, config.n_loops + 1):
        x = z + state["loop_encoding"][loop - 1]  # eq. 3
        z = recompute(net.block, x, use_reentrant=False) if checkpoint else net.block(x)
        if loop in config.head_loops:
            logits[loop] = net.head(loop, z)
    return logits


def reference_loss(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    ids: Tensor,
    targets: Tensor,
    aux_weight: float,
    *,
    training: bool = False,
    checkpoint: bool = False,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of eq. 5 and {loop: mean cross-entropy in nats, eq. 4}, through full logits.

    `targets` (B, T) hold the next token of each position; -100 is not scored.
    Without intermediate heads eq. 5 has nothing to weigh: the total is the final loss.
    """
    logits = reference_logits(state, config, ids, training=training, checkpoint=checkpoint)
    losses = {
        loop: F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        for loop, scores in logits.items()
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
        """Eq. 1: (B, T) ids to (B, T, d)."""
        h = self.linear("embed.proj", self.state["embed.tokens.weight"][ids])
        h = self.trm("embed", self.config.n_embed_cycles, h)
        return h + self.state["positions"][: ids.shape[1]]

    def block(self, x: Tensor) -> Tensor:
        """The one block of eq. 3, (B, T, d) to (B, T, d): attention, then TRM, each added."""
        x = self.norm("block.norm1", x + self.dropout(self.attention(x)))
        return self.norm("block.norm2", x + self.trm("block.trm", self.config.n_cycles, x))

    def attention(self, x: Tensor) -> Tensor:
        """Causal multi-head attention with its (B, heads, T, T) scores written out."""
        length, n_heads = x.shape[1], self.config.n_heads
        q, k, v = (
            part.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in self.linear("block.attention.qkv", x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, T, T)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        mixed = (self.dropout(weights) @ v).transpose(1, 2).flatten(2)  # (B, T, d)
        return self.linear("block.attention.out", mixed)

    def trm(self, name: str, n_cycles: int, h: Tensor) -> Tensor:
        """`n_cycles` applications of eq. 2; the residual stream is inside it."""
        config = self.config
        for i in range(n_cycles):
            cycle = f"{name}.cycles.{0 if config.share_cycle_weights else i}"
            h = h + self.dropout(self.cycle(cycle, config.dilations[i % len(config.dilations)], h))
        return h

    def cycle(self, name: str, dilation: int, h: Tensor) -> Tensor:
        """What one cycle adds to `h`, before dropout: eq. 2 and the variants of Table 3."""
        trm = self.config.trm
        if trm in ("depthwise_mlp", "depthwise"):
            h = F.gelu(self.depthwise_conv(f"{name}.conv.depthwise", dilation, h))
            h = self.dropout(self.linear(f"{name}.conv.pointwise", h))
        elif trm in ("conv", "conv_linear"):
            h = self.dropout(F.gelu(self.full_conv(f"{name}.conv.full", dilation, h)))
        h = self.norm(f"{name}.norm", h)
        if trm in ("depthwise_mlp", "conv_linear", "linear"):
            h = self.linear(f"{name}.down", F.gelu(self.linear(f"{name}.up", h)))
        return h

    def taps(self, dilation: int, h: Tensor) -> list[Tensor]:
        """For each kernel tap, `h` shifted to where that tap reads; zeros beyond the ends."""
        length, kernel = h.shape[1], self.config.kernel_size
        reach = (kernel - 1) * dilation
        left = reach if self.config.causal else (kernel // 2) * dilation
        padded = F.pad(h, (0, 0, left, reach - left))  # (B, T + reach, d)
        return [padded[:, j * dilation : j * dilation + length] for j in range(kernel)]

    def depthwise_conv(self, name: str, dilation: int, h: Tensor) -> Tensor:
        """A filter of its own for each feature; weight (d, 1, kernel)."""
        weight = self.weight(name)
        return sum(weight[:, 0, j] * tap for j, tap in enumerate(self.taps(dilation, h)))

    def full_conv(self, name: str, dilation: int, h: Tensor) -> Tensor:
        """Every feature reads every feature; weight (d out, d in, kernel)."""
        weight = self.weight(name)
        return sum(F.linear(tap, weight[:, :, j]) for j, tap in enumerate(self.taps(dilation, h)))

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The norm of the configuration over (B, T, d)."""
        kind = self.config.norm
        if kind == "none":
            return x
        if kind == "rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight(name)
        if kind == "batch" and not self.training:
            x = x - self.state[f"{name}.running_mean"]
            variance = self.state[f"{name}.running_var"]
        else:
            over = -1 if kind == "layer" else (0, 1)
            x = x - x.mean(over, keepdim=True)
            variance = x.square().mean(over, keepdim=True)
        return x * torch.rsqrt(variance + EPS) * self.weight(name) + self.state[f"{name}.bias"]

    def head(self, loop: int, z: Tensor) -> Tensor:
        """Logits (B, T, V) of the head after `loop`."""
        sharing = self.config.head_sharing
        if sharing == "tied":
            return F.linear(self.linear(f"heads.{loop}", z), self.state["embed.tokens.weight"])
        if sharing == "separate":
            return self.linear(f"heads.{loop}", z)
        return self.linear("heads.final" if loop == self.config.n_loops else "heads.aux", z)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x` times the transposed weight, plus the bias where there is one."""
        return F.linear(x, self.weight(name), self.state.get(f"{name}.bias"))

    def weight(self, name: str) -> Tensor:
        """The weight called `name`."""
        return self.state[f"{name}.weight"]

    def dropout(self, x: Tensor) -> Tensor:
        """Dropout at the configured rate while training."""
        return F.dropout(x, self.config.dropout, self.training)
