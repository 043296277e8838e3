"""CRT: one transformer block applied `n_loops` times, with a prediction head at several loops.

Equations and sections are those of the CRT-Deep paper. Shapes: B rows, T positions, d = d_model.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import ModelConfig
from crt_lib.data import check_ids, check_targets
from crt_lib.files import InputError
from crt_lib.kernels import Dropout, Recomputing, recomputed
from crt_lib.layers import Attention, DilatedConv, make_norm
from crt_lib.loss import exit_losses

if TYPE_CHECKING:
    from crt_lib.cached.memory import ConvMemory, LayerMemory, Memory


class Cycle(Recomputing):
    """One TRM cycle: h + drop(W2 gelu(W1 norm(conv(h)))) (eq. 2), and the variants of Table 3.

    The paper names the variants without defining them. Assumed: `linear` has no convolution; `conv`
    and `depthwise` have no MLP, h + drop(norm(conv(h))); `conv` and `conv_linear` convolve fully.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.has_conv = config.trm != "linear"
        self.has_mlp = config.trm in ("depthwise_mlp", "linear", "conv_linear")
        if self.has_conv:
            self.conv = DilatedConv(config, config.trm in ("depthwise_mlp", "depthwise"))
        self.norm = make_norm(config)
        self.conv_after_norm = config.conv_after_norm
        self.gated = config.activation == "swiglu"
        if self.has_mlp:
            width = config.mlp_ratio * d
            if self.gated:
                width = 2 * width // 3
            self.up = nn.Linear(d, 2 * width if self.gated else width)
            self.down = nn.Linear(width, d)
        self.dropout = Dropout(config.dropout)

    def compute(self, h: Tensor, dilation: int, memory: "ConvMemory | None" = None) -> Tensor:
        """(B, T, d) to (B, T, d); with `memory`, after the positions that it holds."""
        x = h
        if self.conv_after_norm:
            x = self.norm(x)
        if self.has_conv:
            x = self.conv(x, dilation, memory)
        if not self.conv_after_norm:
            x = self.norm(x)
        if self.has_mlp:
            x = self.down(self._activate(self.up(x)))
        return h + self.dropout(x)

    def _activate(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class TRM(nn.Module):
    """`n_cycles` TRM cycles in a row; cycle i uses `dilations[i % len(dilations)]`."""

    def __init__(self, config: ModelConfig, n_cycles: int):
        super().__init__()
        own = min(n_cycles, 1) if config.share_cycle_weights else n_cycles
        self.cycles = nn.ModuleList(Cycle(config) for _ in range(own))
        self.dilations = [config.dilations[i % len(config.dilations)] for i in range(n_cycles)]

    def forward(self, h: Tensor, memory: "LayerMemory | None" = None) -> Tensor:  # (B, T, d)
        convolutions = memory.convolutions if memory is not None else ()
        for i, dilation in enumerate(self.dilations):
            own = convolutions[i] if convolutions else None
            h = self.cycles[i % len(self.cycles)](h, dilation, own)
        return h


class Block(nn.Module):
    """The one block, applied at every loop (eq. 3): attention, then the TRM, each post-norm.

    With residual="pre" the sums are not normalised: attention reads norm1(x), and the TRM, whose
    cycles normalise and add by themselves, is all of the second half.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre = config.residual == "pre"
        self.attention = Attention(config)
        self.norm1 = make_norm(config)
        self.trm = TRM(config, config.n_cycles)
        if not self.pre:
            self.norm2 = make_norm(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, memory: "LayerMemory | None" = None) -> Tensor:  # (B, T, d)
        if self.pre:
            x = self.trm(x + self.dropout(self.attention(self.norm1(x), memory)), memory)
        else:
            x = self.norm1(x + self.dropout(self.attention(x, memory)))
            x = self.norm2(x + self.trm(x, memory))
        if memory is not None:
            memory.length += x.shape[1]
        return x


class TRMEmbedding(nn.Module):
    """Embedding(V, d/2) -> Linear(d/2, d) -> `n_embed_cycles` TRM cycles (eq. 1).

    An embedding as wide as the model needs no projection and has none.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.embedding_width
        self.tokens = nn.Embedding(config.vocab_size, width)
        same = width == config.d_model
        self.proj = nn.Identity() if same else nn.Linear(width, config.d_model)
        trm = TRM(config, config.n_embed_cycles)
        self.cycles, self.dilations, self._refine = trm.cycles, trm.dilations, trm.forward
        if config.head_sharing == "tied":
            # as an output matrix, N(0, 1) rows would start the logits with a deviation near 9
            nn.init.normal_(self.tokens.weight, std=width**-0.5)

    def forward(self, ids: Tensor, memory: "LayerMemory | None" = None) -> Tensor:
        """Ids (B, T), or rows of the table for them (B, T, width), to (B, T, d)."""
        rows = ids if ids.is_floating_point() else self.tokens(ids)
        z = self._refine(self.proj(rows), memory)
        if memory is not None:
            memory.length += z.shape[1]
        return z


class CRT(nn.Module):
    """The language model. Token ids (B, T) in, logits or losses at each exit loop out.

    `compile_block()` compiles the block, which is nearly all of the model's work.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self._compiled = self._checkpointing = False
        self.gate: Any = None  # crt_lib.exits.gate.Gate, once one is fitted
        self.embed = TRMEmbedding(config)
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(config.max_seq_len, config.d_model))
        self.loop_encoding = nn.Parameter(0.02 * torch.randn(config.n_loops, config.d_model))
        if config.injection:
            self.injection = nn.Parameter(torch.zeros(config.d_model))
        self.dropout = Dropout(config.embed_dropout)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.n_prelude))
        self.block = Block(config)
        self.heads = nn.ModuleDict(_make_heads(config))
        if config.exit_norm:
            norms = {str(loop): make_norm(config) for loop in config.head_loops}
            self.exit_norms = nn.ModuleDict(norms)
        if config.init == "scaled":
            scale_initialisation(self)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass instead of kept.

        Of each attention and cycle alone, up to its last product but without it; of a compiled
        block as a whole.
        """
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self._checkpointing = on
        for module in self.modules():
            if isinstance(module, Recomputing):
                module.recomputes = on and not self._compiled

    def forward(
        self,
        ids: Tensor,
        exits: Sequence[int] | None = None,
        targets: Tensor | None = None,
        reduction: str = "mean",
    ) -> dict[int, Tensor]:
        """Logits (B, T, V) for each loop of `exits` (default: every loop with a head).

        With `targets` (B, T), -100 where nothing is scored: the cross-entropy in nats of each exit
        instead (eq. 4), without ever holding its logits; a scalar mean over the scored positions,
        or (B, T) with zeros at the others for `reduction="none"`.
        Raises InputError for ids outside the vocabulary, T above max_seq_len, loops without a head.
        """
        exits = self._check_exits(exits)
        check_ids(ids, self.config)
        if targets is not None:
            check_targets(targets, ids, self.config)
        states = (pair for pair in self.hidden_states(ids, max(exits)) if pair[0] in exits)
        if targets is None:
            return {loop: F.linear(*self.readout(loop, z)) for loop, z in states}
        by_matrix: dict[Tensor, dict[int, Tensor]] = {}
        for loop, z in states:
            features, weight = self.readout(loop, z)
            by_matrix.setdefault(weight, {})[loop] = features
        losses: dict[int, Tensor] = {}
        for weight, by_loop in by_matrix.items():
            values = exit_losses(list(by_loop.values()), weight, targets, reduction)
            losses |= dict(zip(by_loop, values, strict=True))
        return dict(sorted(losses.items()))

    def hidden_states(self, ids: Tensor, n_loops: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (loop, z) for loops 1..`n_loops`, z (B, T, d) being the state after that loop."""
        z, embedded = self.begin(ids)
        for loop in range(1, n_loops + 1):
            z = self.apply_loop(loop, z, embedded)
            yield loop, z

    def begin(self, ids: Tensor, memory: "Memory | None" = None) -> tuple[Tensor, Tensor]:
        """The state that enters loop 1 and the embedding it came from, both (B, T, d).

        With `memory`, those of positions after the ones that it holds.
        """
        own = memory.embedding if memory is not None else None
        if self.config.positions == "learned":
            n = ids.shape[1]
            at = torch.arange(n, device=ids.device) if own is None else own.positions(n)
            added = self.positions[at.clamp(min=0)].view(-1, n, self.config.d_model)
        z = self._run(self.embed, ids, own)
        if self.config.positions == "learned":
            z = z + added
        z = embedded = self.dropout(z)
        for i, block in enumerate(self.prelude):
            z = self._run(block, z, memory.prelude[i] if memory is not None else None)
        return z, embedded

    def apply_loop(
        self, loop: int, z: Tensor, embedded: Tensor, memory: "LayerMemory | None" = None
    ) -> Tensor:
        """The state after `loop` (B, T, d) from that before it and `begin`'s embedding; eq. 3."""
        z = z + self.loop_encoding[loop - 1]
        if self.config.injection:
            z = z + self.injection * embedded
        return self._run(self.block, z, memory)

    def _run(self, module: nn.Module, x: Tensor, memory: "LayerMemory | None") -> Tensor:
        whole = self._checkpointing and self._compiled
        if whole and memory is None and torch.is_grad_enabled():
            return recomputed(module, module, x)
        return module(x, memory)

    def readout(self, loop: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """The features and the vocabulary matrix whose product is the logits of exit `loop`."""
        sharing = self.config.head_sharing
        if self.config.exit_norm:
            z = self.exit_norms[str(loop)](z)
        if sharing == "tied":  # as wide as the embedding
            return self.heads[str(loop)](z), self.embed.tokens.weight
        shared = "final" if loop == self.config.n_loops else "aux"
        head = self.heads[str(loop) if sharing == "separate" else shared]
        return z, cast(nn.Linear, head).weight  # (B, T, d), (V, d)

    def compile_block(self) -> None:
        """Compile the block in place with torch.compile; parameter names do not change."""
        self.block.compile()
        self._compiled = True
        self.gradient_checkpointing = self._checkpointing

    def _check_exits(self, exits: Sequence[int] | None) -> tuple[int, ...]:
        allowed = self.config.head_loops
        exits = allowed if exits is None else tuple(exits)
        for loop in exits:
            if loop not in allowed:
                raise InputError(f"loop {loop} has no head; loops with one are {allowed}")
        if not exits:
            raise InputError(f"no exit loop was asked for; loops with a head are {allowed}")
        return exits


@torch.no_grad()
def scale_initialisation(model: CRT) -> None:
    """GPT-2's initialisation, in place: N(0, 0.02), biases 0; matrices that add to the stream are
    divided by the square root of how many additions a pass makes; depthwise kernels pass the
    current position through unchanged.

    The square root is right for independent additions; those of a repeated block are alike, so the
    stream still grows with the loops, though several times less than without it.
    """
    config = model.config
    additions = (config.n_prelude + config.n_loops) * (1 + config.n_cycles)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=0.02 / additions**0.5 if adds else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d) and module.groups == 1:
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv1d):
            nn.init.zeros_(module.weight)
            module.weight[:, :, -1 if config.causal else config.kernel_size // 2] = 1.0
            if config.conv_noise:
                module.weight += config.conv_noise * torch.randn_like(module.weight)


def _make_heads(config: ModelConfig) -> dict[str, nn.Module]:
    d, width = config.d_model, config.vocab_size
    names = [str(loop) for loop in config.head_loops]
    if config.head_sharing == "shared_aux":
        names = ["aux", "final"] if config.exit_loops else ["final"]
    elif config.head_sharing == "tied":  # to the width of the embedding, whose matrix follows
        width = config.embedding_width
        if width == d:
            return {name: nn.Identity() for name in names}
    return {name: nn.Linear(d, width, bias=False) for name in names}
