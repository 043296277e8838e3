"""What positions leave behind for later ones, so that decoding computes each of them once.

Every loop has its own: attention's keys and values, and the inputs of each convolution. A token
that has left keeps what it had at the loop it left after: there a deeper loop finds, in place of
its own, the entries of the loop before (`Memory.active`). B rows, n new positions.

Parts know their whole by weak references: its arrays are free as soon as nobody holds it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.config import ModelConfig
from crt_lib.files import InputError


class ConvMemory:
    """The inputs of one causal convolution, which are number `site` in `Memory.inputs`."""

    def __init__(self, layer: "LayerMemory", site: int, reach: int):
        self.layer: LayerMemory = weakref.proxy(layer)
        self.site, self.reach = site, reach

    def extend(self, h: Tensor) -> Tensor:
        """Add the inputs (B, n, d); returns them after the `reach` before, (B, reach + n, d)."""
        layer, memory, n = self.layer, self.layer.memory, h.shape[1]
        begin = memory.reach + layer.length
        here = slice(begin, begin + n)
        if memory.active is not None:
            before = memory.inputs[self.site - len(layer.convolutions), :, here]
            h = torch.where(memory.active[..., None], h, before)
        if memory.starts is not None:  # the convolution sees zeros before a row's first token
            h = h.masked_fill(layer.positions(n)[:, 0, :, None] < 0, 0.0)
        memory.inputs[self.site, :, here] = h
        return memory.inputs[self.site, :, begin - self.reach : begin + n]


class LayerMemory:
    """Of one application of a block, number `index` in `Memory.kv`, or of the embedding, -1."""

    def __init__(self, memory: "Memory", index: int, first_site: int, reaches: list[int]):
        self.memory: Memory = weakref.proxy(memory)
        self.index, self.length = index, 0
        self.sites = slice(first_site, first_site + len(reaches))
        self.convolutions = [ConvMemory(self, first_site + i, r) for i, r in enumerate(reaches)]

    def positions(self, n: int) -> Tensor:
        """Of the next n tokens, counted from each row's first: (n,), or (B, 1, n) with starts."""
        at = torch.arange(self.length, self.length + n, device=self.memory.kv.device)
        starts = self.memory.starts
        return at if starts is None else at - starts[:, None, None]

    def shared(self, name: str, n: int, make: Callable[[], Any]) -> Any:
        """What `make` gives for the next n positions, made once for all layers that are as far."""
        kept = self.memory.kept.get(name)
        if kept is None or kept[0] != (self.length, n):
            kept = self.memory.kept[name] = (self.length, n), make()
        return kept[1]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add (B, heads, n, head_dim) each; all keys, all values, and who attends to whom."""
        at, n, memory = self.length, keys.shape[2], self.memory
        new = torch.stack([keys, values])
        if memory.active is not None:
            before = memory.kv[self.index - 1, ..., at : at + n, :]
            new = torch.where(memory.active[:, None, :, None], new, before)
        memory.kv[self.index, ..., at : at + n, :] = new
        keys, values = memory.kv[self.index, ..., : at + n, :]
        return keys, values, self.shared("mask", n, lambda: self._mask(at, n))

    def _mask(self, at: int, n: int) -> Tensor | None:
        starts = self.memory.starts
        if n == 1 and starts is None:
            return None
        to = torch.arange(at + n, device=self.memory.kv.device)
        fro = to[at:, None]
        mask = to <= fro  # (n, at + n)
        if starts is None:
            return mask
        own = to == fro  # padding attends to itself: a softmax over nothing is not a number
        return (mask & (to >= starts[:, None, None]) | own)[:, None]  # (B, 1, n, at + n)


class Memory:
    """Of a whole model, for `rows` texts of up to `capacity` tokens.

    `starts` (B,): how much padding each row has on its left; None: none. Raises InputError for more
    positions than the model has, and for a model that sees the future.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        like: Tensor,
        starts: Tensor | None = None,
    ):
        if not config.causal:
            raise InputError(
                "this model sees the future: what it computed for a position changes with every "
                "token after it, so there is nothing to keep; only a causal model generates"
            )
        self.rows, self.starts, self.max_seq_len = rows, starts, config.max_seq_len
        self.active: Tensor | None = None  # (B, n) the tokens in hand that have not left; all
        self.kept: dict[str, tuple[tuple[int, int], Any]] = {}  # of `LayerMemory.shared`
        blocks, sites = config.n_prelude + config.n_loops, 0
        self.layers: list[LayerMemory] = []  # as they are computed, the embedding first
        for index in range(-1, blocks):
            count = config.n_embed_cycles if index < 0 else config.n_cycles
            own = [config.dilations[i % len(config.dilations)] for i in range(count)]
            reaches = [(config.kernel_size - 1) * d for d in own if config.trm != "linear"]
            self.layers.append(LayerMemory(self, index, sites, reaches))
            sites += len(reaches)
        self.embedding, *others = self.layers
        self.prelude, self.loops = others[: config.n_prelude], others[config.n_prelude :]
        every = [conv.reach for layer in self.layers for conv in layer.convolutions]
        self.reach, self.capacity = max(every, default=0), 0
        heads, width = config.n_heads, config.d_model // config.n_heads
        self.kv = like.new_zeros(blocks, 2, rows, heads, 0, width)  # keys and values
        self.inputs = like.new_zeros(sites, rows, self.reach, config.d_model)
        self.reserve(capacity)

    @property
    def length(self) -> int:
        """Positions that the embedding has seen."""
        return self.embedding.length

    def settle(self, last: int) -> None:
        """All tokens have left: loops after `last` take over from it what they have not run for."""
        self.active, before = None, self.loops[last - 1]
        for layer in self.loops[last:]:
            here, there = (slice(at + layer.length, at + self.length) for at in (0, self.reach))
            self.kv[layer.index, ..., here, :] = self.kv[before.index, ..., here, :]
            self.inputs[layer.sites, :, there] = self.inputs[before.sites, :, there]
            layer.length = self.length

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is there; InputError for too many."""
        if capacity > self.max_seq_len:
            raise InputError(
                f"{capacity} tokens asked for, max_seq_len is {self.max_seq_len}; ask for fewer"
            )
        more = max(0, capacity - self.capacity)
        self.capacity += more
        self.kv, self.inputs = (F.pad(held, (0, 0, 0, more)) for held in (self.kv, self.inputs))

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row `rows[i]` held; there may be more or fewer than before."""
        self.rows, self.kept = len(rows), {}
        if self.starts is not None:
            self.starts = self.starts[rows]
        self.kv, self.inputs = self.kv.index_select(2, rows), self.inputs.index_select(1, rows)
