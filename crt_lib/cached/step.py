"""The model as decoding runs it, with a memory: many positions at a time, or one fast.

`Window` is `crt_lib.model.CRT` itself. `Step` computes the same for one new token of each row, over
plain (B, d) tensors and without modules, and leaves the same in the same memory. It is fast because
weights are laid out for B rows (`products`) and operations are few; an operation costs as much as a
small product. Both: `begin`, then `loop` and `readout`, `keep` where rows leave, then `end`. Of one
row a `Step` also reads several tokens at once, or goes on with those begun (`read`, `catch_up`).
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from types import EllipsisType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import Layout, Product, Quantized
from crt_lib.cached.recall import Run, Token
from crt_lib.kernels import TimeBatchNorm
from crt_lib.layers import DilatedConv
from crt_lib.model import CRT, TRM, Block, Cycle, TRMEmbedding

Function = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A context in which a module is in evaluation mode; each part is then in its own again."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class Window:
    """`model` on n positions of each row, after what `memory` holds; None: nothing before them."""

    def __init__(self, model: CRT, memory: Memory | None = None, last: bool = False):
        self.model, self.memory = model, memory
        # of states (B, n, d), those whose logits are wanted
        self.kept: tuple[slice, ...] = (slice(None), slice(-1 if last else None, None))
        self._vocabularies: dict[Tensor, Product] = {}

    def begin(self, ids: Tensor) -> Tensor:
        """The state (B, n, d) that enters loop 1, of `ids` (B, n) or their embeddings."""
        z, self.embedded = self.model.begin(ids, self.memory)
        return z

    def loop(self, number: int, z: Tensor) -> Tensor:
        """The state after loop `number`, from that before it."""
        memory = None if self.memory is None else self.memory.loops[number - 1]
        return self.model.apply_loop(number, z, self.embedded, memory)

    def readout(self, number: int, z: Tensor) -> tuple[Tensor, Product]:
        """The features of exit `number`, and the vocabulary that makes them logits."""
        features, weight = self.model.readout(number, z)
        return features, self._vocabularies.setdefault(weight, Product(weight.t()))

    def keep(self, active: Tensor) -> None:
        """From now on tokens that are not `active` (B, n) leave behind what the loop before did."""
        if self.memory is not None:
            self.memory.active = active

    def end(self, last: int) -> None:
        """All tokens have left after loop `last`: deeper ones take over what it left."""
        if self.memory is not None:
            self.memory.settle(last)


class Step:
    """`model` in evaluation mode on one token a row, after what `memory` holds.

    The weights are read when it is made. `quantize`: None or "int8" (`Layout`).
    """

    kept: EllipsisType = ...  # of states (B, d) all

    def __init__(self, model: CRT, memory: Memory, quantize: str | None = None):
        config, self.layout = model.config, Layout(memory.rows, quantize)
        self.model, self.memory, self.config, self.rows = model, memory, config, memory.rows
        self.token = Token(model, memory)
        self.table = model.embed.tokens.weight.detach()
        self.project = _linear(model.embed.proj, self.layout)
        self.refine = _trm(model.embed, self.layout)
        self.learned = model.positions.detach() if config.positions == "learned" else None
        self.prelude = [_Block(cast(Block, block), self) for block in model.prelude]
        self.block = _Block(model.block, self)
        self.encodings = model.loop_encoding.detach()[:, None]  # (n_loops, 1, d)
        self.injection = model.injection.detach() if config.injection else None
        self.heads = _heads(model, self.layout)

    def begin(self, ids: Tensor) -> Tensor:
        """The state (B, d) that enters loop 1, of tokens `ids` (B,)."""
        memory = self.memory
        self.at = memory.length
        self.token.begin(self.at)
        z = self.refine(self.project(torch.embedding(self.table, ids)), self.token)
        if self.learned is not None:
            z = z + self.learned[self.at if memory.starts is None else self.at - memory.starts]
        self.embedded, entering = z, self.encodings
        if self.injection is not None:
            entering = torch.addcmul(entering, self.injection, z)
        self.entering = entering.unbind(0)  # what each loop adds to the state
        for index, block in enumerate(self.prelude):
            z = block(z, index, self.token)
        return z

    def loop(self, number: int, z: Tensor) -> Tensor:
        """The state (B, d) after loop `number`, from that before it."""
        layer = self.config.n_prelude + number - 1
        return self.block(z + self.entering[number - 1], layer, self.token)

    def readout(self, number: int, z: Tensor) -> tuple[Tensor, Product]:
        """The features (B, width) of exit `number`, and the vocabulary that makes them logits."""
        norm, narrow, vocabulary = self.heads[number]
        return narrow(norm(z)), vocabulary

    def keep(self, active: Tensor) -> None:
        """From now on rows that are not `active` (B,) leave behind what the loop before did."""
        self.token.keep(active[:, None])

    def end(self, last: int, settle: bool = True) -> None:
        """All rows have left after loop `last`: deeper ones `settle`, or must yet be run."""
        memory, run = self.memory, self.config.n_prelude + last
        self.token.convolve.end()
        slot = self.token.attend.slot
        if settle and run < len(slot):
            slot[run:] = slot[run - 1]
        for layer in memory.layers if settle else memory.layers[: run + 1]:
            layer.length = self.at + 1

    def read(self, ids: Tensor, last: int) -> Tensor:
        """The states (n, d) after loop `last` of `ids` (n,), the next tokens of the one row.

        All leave after it.
        """
        memory = self.memory
        if len(ids) == 1:
            z = self.begin(ids)
            for number in range(1, last + 1):
                z = self.loop(number, z)
            self.end(last)
            return z
        run = Run(self.token, -1, memory.length, len(ids))
        z = self.refine(self.project(torch.embedding(self.table, ids)), run)
        if self.learned is not None:
            z = z + self.learned[run.begin : run.end]
        embedded = z
        for index, block in enumerate(self.prelude):
            z = block(z, index, run)
        z = self._loops(0, z, embedded, run, last)
        for layer in memory.layers[: 1 + self.config.n_prelude + last]:
            layer.length = run.end
        memory.settle(last)
        return z

    def catch_up(self, passed: int, z: Tensor, embedded: Tensor) -> Tensor:
        """The states (n, d) after the last loop, of the last n tokens of the one row.

        `z` and `embedded` (n, d) are what loop `passed` and `begin` gave for each of them, where
        `end` has left deeper loops yet to be run.
        """
        memory, first = self.memory, self.config.n_prelude + passed
        run = Run(self.token, first, memory.length - len(z), len(z))
        z = self._loops(passed, z, embedded, run, self.config.n_loops)
        for layer in memory.loops[passed:]:
            layer.length = run.end
        return z

    def _loops(self, passed: int, z: Tensor, embedded: Tensor, run: Run, last: int) -> Tensor:
        for number in range(passed + 1, last + 1):
            entering = self.encodings[number - 1]
            if self.injection is not None:
                entering = torch.addcmul(entering, self.injection, embedded)
            z = self.block(z + entering, self.config.n_prelude + number - 1, run)
        return z


class _Block:
    """As `crt_lib.model.Block`."""

    def __init__(self, block: Block, step: Step):
        attention, layout = block.attention, step.layout
        self.pre = block.pre
        weight = attention.qkv.weight.detach().clone()
        d = weight.shape[1]
        weight[:d] *= (d // attention.n_heads) ** -0.5  # the scale of the scores
        self.qkv, self.out = layout.of(weight, None), layout.layer(attention.out)
        self.norm1, self.trm = _norm(block.norm1), _trm(block.trm, layout)
        self.norm2 = _same if self.pre else _norm(block.norm2)

    def __call__(self, x: Tensor, layer: int, tokens: Token | Run) -> Tensor:
        given = self.qkv(self.norm1(x) if self.pre else x)
        x = self.out.add(x, tokens.attend(layer, given))
        if self.pre:
            return self.trm(x, tokens)
        x = self.norm1(x)
        return self.norm2(x + self.trm(x, tokens))


def _trm(trm: TRM | TRMEmbedding, layout: Layout) -> Callable[[Tensor, Token | Run], Tensor]:
    """As `crt_lib.model.TRM`."""
    own = [_Cycle(cast(Cycle, cycle), layout) for cycle in trm.cycles]

    def apply(h: Tensor, tokens: Token | Run) -> Tensor:
        for i in range(len(trm.dilations)):
            h = own[i % len(own)](h, tokens)
        return h

    return apply


class _Cycle:
    """As `crt_lib.model.Cycle`."""

    def __init__(self, cycle: Cycle, layout: Layout):
        self.norm, self.norm_first = _norm(cycle.norm), cycle.conv_after_norm
        self.convolves = cycle.has_conv
        self.mix = _mixing(cycle.conv, layout) if cycle.has_conv else _same
        self.mlp = _mlp(cycle, layout) if cycle.has_mlp else torch.add

    def __call__(self, h: Tensor, tokens: Token | Run) -> Tensor:
        x = self.norm(h) if self.norm_first else h
        if self.convolves:
            x = self.mix(tokens.convolve(x))
        return self.mlp(h, x if self.norm_first else self.norm(x))


def _mlp(cycle: Cycle, layout: Layout) -> Callable[[Tensor, Tensor], Tensor]:
    """(h, x) -> h + down(gelu(up(x))), or with silu(gate) * value in the middle.

    With gelu and not in 8 bits in three operations: the bias of `down` is one more row of its
    weight, of a feature that is 1.
    """
    up, down = layout.layer(cycle.up), layout.layer(cycle.down)

    def plainly(h: Tensor, x: Tensor) -> Tensor:
        x = up(x)
        if not cycle.gated:
            return down.add(h, F.gelu(x))
        gate, value = x.chunk(2, -1)
        return down.add(h, F.silu(gate) * value)

    if cycle.gated or isinstance(up, Quantized):
        return plainly
    weight, bias = up.weight, cycle.up.bias.detach()
    back = torch.cat([down.weight, cycle.down.bias.detach()[None]])
    width = len(back) - 1

    @cache
    def buffers(rows: int) -> tuple[Tensor, ...]:
        hidden, middle = (back.new_ones(rows, n) for n in (width, width + 1))
        # as transposes: torch then leaves gelu to its own kernel; a call of oneDNN's takes longer
        halves = (2 - width % 2, -1)
        return hidden, middle, *(x.unflatten(1, halves).mT for x in (hidden, middle[:, :-1]))

    def apply(h: Tensor, x: Tensor) -> Tensor:
        hidden, middle, out_of, into = buffers(len(x))
        torch.addmm(bias, x, weight, out=hidden)
        F.gelu(out_of, out=into)  # type: ignore[call-arg]  # torch's annotation forgets `out`
        return torch.addmm(h, middle, back)

    return apply


def _mixing(conv: DilatedConv, layout: Layout) -> Function:
    """What a convolution does after its sum over time."""
    if not conv.is_depthwise:
        weight = conv.full.weight.detach().permute(0, 2, 1).flatten(1)  # (d, k * d)
        full = layout.of(weight, None)
        return lambda x: F.gelu(full(x))
    if not conv.has_pointwise:
        return _same
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
    shape, weight, eps = norm.normalized_shape, norm.weight.detach(), norm.eps
    if isinstance(norm, nn.RMSNorm):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias = norm.bias.detach()
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps or 0.0, False)


def _heads(model: CRT, layout: Layout) -> dict[int, tuple[Function, Function, Product]]:
    """Of each exit its norm, its map to the width of the vocabulary, and the vocabulary."""
    config, found = model.config, {}
    vocabularies: dict[Tensor, Product] = {}
    for n in config.head_loops:
        norm = _norm(model.exit_norms[str(n)]) if config.exit_norm else _same
        narrow = _linear(model.heads[str(n)], layout) if config.head_sharing == "tied" else _same
        weight = model.readout(n, model.loop_encoding[None, :1])[1]
        if weight not in vocabularies:
            vocabularies[weight] = layout.of(weight.detach(), None, vocabulary=True)
        found[n] = norm, narrow, vocabularies[weight]
    return found


def _linear(layer: nn.Module, layout: Layout) -> Function:
    return layout.layer(layer) if isinstance(layer, nn.Linear) else _same


def _same(x: Tensor) -> Tensor:
    return x
