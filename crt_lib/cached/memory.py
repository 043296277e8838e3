"""What positions leave behind for later ones, so that decoding computes each of them once.

Every loop has its own: attention's keys and values, and the inputs of each convolution. A token
that has left keeps what it had at the loop it left after: there a deeper loop finds, in place of
its own, the entries of the loop before (`LayerMemory.follow`). B rows, n new positions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.config import ModelConfig
from crt_lib.files import InputError


class ConvMemory:
    """The inputs of one causal convolution, cycle `cycle` of `layer`."""

    def __init__(self, layer: "LayerMemory", cycle: int, reach: int):
        self.layer, self.cycle, self.reach = layer, cycle, reach
        self.site = 0  # where it is in `Memory.inputs`

    @property
    def inputs(self) -> Tensor:
        """(B, reach + capacity, d), zeros first."""
        memory = self.layer.memory
        return memory.inputs[self.site, :, memory.reach - self.reach :]

    def extend(self, h: Tensor) -> Tensor:
        """Add the inputs (B, n, d); returns them after the `reach` before, (B, reach + n, d)."""
        at, n, layer, inputs = self.layer.length, h.shape[1], self.layer, self.inputs
        here = slice(self.reach + at, self.reach + at + n)
        if layer.active is not None:
            before = layer.previous.convolutions[self.cycle].inputs
            h = torch.where(layer.active[..., None], h, before[:, here])
        if layer.memory.starts is not None:  # the convolution sees zeros before a row's first token
            h = h.masked_fill(layer.positions(n)[:, 0, :, None] < 0, 0.0)
        inputs[:, here] = h
        return inputs[:, at : self.reach + at + n]


class LayerMemory:
    """Of one application of a block, or of the embedding, which has no attention."""

    def __init__(self, memory: "Memory", index: int, config: ModelConfig, n_cycles: int):
        self.memory, self.index, self.length = memory, index, 0
        self.previous: LayerMemory  # there whenever `active` is
        self.active: Tensor | None = None
        dilations = [config.dilations[i % len(config.dilations)] for i in range(n_cycles)]
        self.convolutions = [
            ConvMemory(self, i, (config.kernel_size - 1) * dilation)
            for i, dilation in enumerate(dilations)
            if config.trm != "linear"
        ]

    @property
    def keys(self) -> Tensor:
        """(B, heads, capacity, head_dim)."""
        return self.memory.kv[self.index, 0]

    @property
    def values(self) -> Tensor:
        """(B, heads, capacity, head_dim)."""
        return self.memory.kv[self.index, 1]

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

    def follow(self, previous: "LayerMemory", active: Tensor | None) -> None:
        """For the next pass: positions not `active` (B, n) take the entries of `previous`."""
        self.previous, self.active = previous, active

    def catch_up(self, previous: "LayerMemory", length: int) -> None:
        """Take over from `previous` what all tokens before `length` left there, if this is behind.

        A loop that nobody runs is not written; it is made up for when somebody does.
        """
        if self.length >= length:
            return
        here = slice(self.length, length)
        self.keys[:, :, here] = previous.keys[:, :, here]
        self.values[:, :, here] = previous.values[:, :, here]
        for mine, other in zip(self.convolutions, previous.convolutions, strict=True):
            there = slice(mine.reach + self.length, mine.reach + length)
            mine.inputs[:, there] = other.inputs[:, there]
        self.length = length

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add (B, heads, n, head_dim) each; all keys, all values, and who attends to whom."""
        at, n = self.length, keys.shape[2]
        here = slice(at, at + n)
        if self.active is not None:
            active = self.active[:, None, :, None]
            keys = torch.where(active, keys, self.previous.keys[:, :, here])
            values = torch.where(active, values, self.previous.values[:, :, here])
        self.keys[:, :, here] = keys
        self.values[:, :, here] = values
        mask = self.shared("mask", n, lambda: self._mask(at, n))
        return self.keys[:, :, : at + n], self.values[:, :, : at + n], mask

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
    positions than the model has, and for a model that sees the future: its earlier outputs would
    change with every new token.
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
                "token after it, so there is nothing to keep, and no next token to predict that "
                "it has not seen; only a causal model generates"
            )
        self.max_seq_len = config.max_seq_len
        self._check_capacity(capacity)
        self.rows, self.capacity = rows, capacity
        self.kept: dict[str, tuple[tuple[int, int], Any]] = {}  # of `LayerMemory.shared`
        self.starts = starts
        blocks = config.n_prelude + config.n_loops
        self.embedding = LayerMemory(self, -1, config, config.n_embed_cycles)
        layers = [LayerMemory(self, i, config, config.n_cycles) for i in range(blocks)]
        self.prelude, self.loops = layers[: config.n_prelude], layers[config.n_prelude :]
        shape = (blocks, 2, rows, config.n_heads, capacity, config.d_model // config.n_heads)
        self.kv = like.new_zeros(shape)  # keys and values
        every = [conv for layer in self._layers for conv in layer.convolutions]
        self.convolutions = sorted(every, key=lambda conv: conv.reach)
        for site, convolution in enumerate(self.convolutions):
            convolution.site = site
        self.reach = max((conv.reach for conv in every), default=0)
        self.inputs = like.new_zeros(len(every), rows, self.reach + capacity, config.d_model)

    @property
    def length(self) -> int:
        """Positions that the embedding has seen; deeper layers may be behind."""
        return self.embedding.length

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        for layer in self._layers:
            layer.length = min(layer.length, length)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is there; InputError for too many."""
        self._check_capacity(capacity)
        more = capacity - self.capacity
        if more > 0:
            self.capacity = capacity
            self._replace(lambda held, _: F.pad(held, (0, 0, 0, more)))

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row `rows[i]` held; there may be more or fewer than before."""
        self.rows, self.kept = len(rows), {}
        if self.starts is not None:
            self.starts = self.starts[rows]
        self._replace(lambda held, dim: held.index_select(dim, rows))

    @property
    def _layers(self) -> tuple[LayerMemory, ...]:
        return (self.embedding, *self.prelude, *self.loops)

    def _replace(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Put in the place of what is held `change` of it and of the dimension of its rows."""
        self.kv, self.inputs = change(self.kv, 2), change(self.inputs, 1)

    def _check_capacity(self, capacity: int) -> None:
        if capacity > self.max_seq_len:
            raise InputError(
                f"{capacity} tokens asked for, max_seq_len is {self.max_seq_len}; ask for fewer"
            )
