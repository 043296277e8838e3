"""One token of each row at a time: what the model computes, without its modules.

`Step` reads like `crt_lib.model`, over plain (B, d) tensors: `begin`, `loop` and `readout` compute
for one new position what those of `CRT` compute for any number, and leave the same in the same
memory. It is fast because weights are laid out for B rows (`products`) and operations are
few; an operation costs as much as a small product.
"""

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import Layout, Product
from crt_lib.cached.recall import Convolutions, Heads
from crt_lib.kernels import TimeBatchNorm
from crt_lib.layers import DilatedConv
from crt_lib.model import CRT, TRM, Block, Cycle, TRMEmbedding

Function = Callable[[Tensor], Tensor]


class Step:
    """`model` in evaluation mode on one token a row, after what `memory` holds.

    The weights are read when it is made: a model that is trained further needs another. `quantize`:
    None or "int8" (`crt_lib.cached.products.Layout`).
    """

    def __init__(self, model: CRT, memory: Memory, quantize: str | None = None):
        config, self.layout = model.config, Layout(memory.rows, quantize)
        self.model, self.memory, self.config, self.rows = model, memory, config, memory.rows
        self.attention, self.convolutions = Heads(model, memory), Convolutions(model, memory)
        self.table = model.embed.tokens.weight.detach()
        self.project = _linear(model.embed.proj, self.layout)
        self.embed_trm = _TRM(model.embed, self)
        self.learned = model.positions.detach() if config.positions == "learned" else None
        self.prelude = [_Block(cast(Block, block), self) for block in model.prelude]
        self.block = _Block(model.block, self)
        self.encodings = model.loop_encoding.detach()[:, None]  # (n_loops, 1, d)
        self.injection = model.injection.detach() if config.injection else None
        self.heads = _heads(model, self.table, self.layout)
        self.asked: dict[str, Any] = {}  # criteria as `crt_lib.exits.policy` asks them of a step

    def begin(self, ids: Tensor, final: int) -> Tensor:
        """The state (B, d) that enters loop 1, of tokens `ids` (B,); loops to `final` may run."""
        memory = self.memory
        self.final, self.at = final, memory.length
        self.active: Tensor | None = None
        self._catch_up()
        self.attention.begin(self.at)
        self.convolutions.begin(self.at)
        z = self.embed_trm(self.project(torch.embedding(self.table, ids)), -1, None)
        if self.learned is not None:
            z = z + self.learned[self.at if memory.starts is None else self.at - memory.starts]
        self.embedded, entering = z, self.encodings
        if self.injection is not None:
            entering = torch.addcmul(entering, self.injection, z)
        self.entering = entering.unbind(0)  # what each loop adds to the state
        for index, block in enumerate(self.prelude):
            z = block(z, index, None)
        return z

    def loop(self, number: int, z: Tensor) -> Tensor:
        """The state (B, d) after loop `number`, from that before it."""
        layer = self.config.n_prelude + number - 1
        return self.block(z + self.entering[number - 1], layer, self.active)

    def readout(self, number: int, z: Tensor) -> tuple[Tensor, Product]:
        """The features (B, width) of exit `number`, and the vocabulary that makes them logits."""
        norm, narrow, vocabulary = self.heads[number]
        return narrow(norm(z)), vocabulary

    def keep(self, active: Tensor) -> None:
        """From now on rows that are not `active` (B,) leave behind what the loop before did."""
        self.active = active[:, None]  # (B, 1)

    def end(self, last: int, settle: bool) -> None:
        """All rows have left after loop `last`; with `settle`, those to `final` take over from it.

        Without, they take over when they are run.
        """
        memory, more = self.memory, self.final - last if settle else 0
        run = self.config.n_prelude + last
        self.convolutions.end(run)
        self.attention.end(run, more)
        for layer in (memory.embedding, *memory.prelude, *memory.loops[: last + more]):
            layer.length = self.at + 1

    def _catch_up(self) -> None:
        """Loops that were not run for earlier tokens take over what those left."""
        loops = self.memory.loops[: self.final]
        if loops[-1].length < self.at:
            for before, layer in itertools.pairwise(loops):
                layer.catch_up(before, self.at)


class _Block:
    """As `crt_lib.model.Block`."""

    def __init__(self, block: Block, step: Step):
        attention, layout = block.attention, step.layout
        self.pre, self.attention = block.pre, step.attention
        weight = attention.qkv.weight.detach().clone()
        d = weight.shape[1]
        weight[:d] *= (d // attention.n_heads) ** -0.5  # the scale of the scores
        self.qkv, self.out = layout.of(weight, None), layout.layer(attention.out)
        self.norm1, self.trm = _norm(block.norm1), _TRM(block.trm, step)
        self.norm2 = _same if self.pre else _norm(block.norm2)

    def __call__(self, x: Tensor, layer: int, active: Tensor | None) -> Tensor:
        self.qkv.into(self.attention.given, self.norm1(x) if self.pre else x)
        x = self.out.add(x, self.attention(layer, active))
        if self.pre:
            return self.trm(x, layer, active)
        x = self.norm1(x)
        return self.norm2(x + self.trm(x, layer, active))


class _TRM:
    """As `crt_lib.model.TRM`."""

    def __init__(self, trm: TRM | TRMEmbedding, step: Step):
        own = [_Cycle(cast(Cycle, cycle), step) for cycle in trm.cycles]
        self.cycles = [own[i % len(own)] for i in range(len(trm.dilations))]

    def __call__(self, h: Tensor, layer: int, active: Tensor | None) -> Tensor:
        for index, cycle in enumerate(self.cycles):
            h = cycle(h, layer, index, active)
        return h


class _Cycle:
    """As `crt_lib.model.Cycle`."""

    def __init__(self, cycle: Cycle, step: Step):
        layout = step.layout
        self.norm, self.norm_first = _norm(cycle.norm), cycle.conv_after_norm
        self.convolve = step.convolutions if cycle.has_conv else None
        self.mix = _mixing(cycle.conv, layout) if cycle.has_conv else None
        self.mlp = layout.mlp(cycle.up, cycle.down, cycle.gated) if cycle.has_mlp else torch.add

    def __call__(self, h: Tensor, layer: int, index: int, active: Tensor | None) -> Tensor:
        x = self.norm(h) if self.norm_first else h
        if self.convolve is not None:
            x = self.convolve(x, layer, index, active)
        if self.mix is not None:
            x = self.mix(x)
        return self.mlp(h, x if self.norm_first else self.norm(x))


def _mixing(conv: DilatedConv, layout: Layout) -> Function | None:
    """What a convolution does after its sum over time."""
    if not conv.is_depthwise:
        weight = conv.full.weight.detach().permute(0, 2, 1).flatten(1)  # (d, k * d)
        return layout.of(weight, None).gelu
    if not conv.has_pointwise:
        return None
    pointwise = layout.layer(conv.pointwise)
    return lambda x: pointwise(F.gelu(x))


def _norm(norm: nn.Module) -> Function:
    if isinstance(norm, TimeBatchNorm):
        assert norm.running_mean is not None and norm.running_var is not None  # it tracks them
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias.detach() - norm.running_mean * scale
        return lambda x: torch.addcmul(shift, x, scale)
    if isinstance(norm, nn.Identity):
        return _same
    assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)  # `make_norm` makes no other
    shape, weight = norm.normalized_shape, norm.weight.detach()
    if isinstance(norm, nn.RMSNorm):
        least = norm.eps
        return lambda x: torch.rms_norm(x, shape, weight, least)
    bias, eps = norm.bias.detach(), norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps, False)


def _heads(
    model: CRT, table: Tensor, layout: Layout
) -> dict[int, tuple[Function, Function, Product]]:
    """Of each exit its norm, its map to the width of the vocabulary, and the vocabulary."""
    config, heads = model.config, model.heads
    norms = {
        n: _norm(model.exit_norms[str(n)]) if config.exit_norm else _same for n in config.head_loops
    }
    if config.head_sharing == "tied":
        vocabulary = layout.of(table, None, vocabulary=True)
        return {n: (norms[n], _linear(heads[str(n)], layout), vocabulary) for n in norms}
    vocabularies = {
        name: layout.layer(cast(nn.Linear, head), vocabulary=True) for name, head in heads.items()
    }
    shared = {n: "final" if n == config.n_loops else "aux" for n in norms}
    names = {n: str(n) for n in norms} if config.head_sharing == "separate" else shared
    return {n: (norms[n], _same, vocabularies[names[n]]) for n in norms}


def _linear(layer: nn.Module, layout: Layout) -> Function:
    return layout.layer(layer) if isinstance(layer, nn.Linear) else _same


def _same(x: Tensor) -> Tensor:
    return x
