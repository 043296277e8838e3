"""What one new token of each row reads of earlier ones, and leaves: attention and convolutions.

Where all layers write and what they read is found once a token (`begin`), not once a loop; B rows,
H heads of D features.
"""

from typing import Any

import torch
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.kernels import turns
from crt_lib.model import CRT


def few(rows: int) -> int:
    """So many rows may have left and be computed along: picking the others would take longer."""
    return max(3, rows // 2)


class Active:
    """The rows of a batch that have not left, as a mask (B, 1); `rows` are those to compute.

    They are all where few have left, None; else indices (n,), and `runs` of neighbours among them.
    """

    def __init__(self, active: Tensor):
        self.mask, self.rows = active[:, None], None
        if len(active) - int(active.sum()) <= few(len(active)):
            return
        self.rows = active.nonzero()[:, 0]
        ends = active.to(torch.int8).diff(prepend=active.new_zeros(1), append=active.new_zeros(1))
        at = ends.nonzero()[:, 0].tolist()
        self.runs = list(zip(at[::2], at[1::2], strict=True))  # (first, past the last)


class Convolutions:
    """All convolutions over time at one token, asked in the order of `Memory.layers`."""

    def __init__(self, model: CRT, memory: Memory):
        config, blocks = model.config, [*model.prelude, *[model.block] * model.config.n_loops]
        trms = [model.embed, *(block.trm for block in blocks)] if config.trm != "linear" else []
        own = [
            (trm.cycles[i % len(trm.cycles)].conv, dilation)
            for trm in trms
            for i, dilation in enumerate(trm.dilations)
        ]
        self.memory, self.cycles, self.count = memory, config.n_cycles, len(own)
        self.depthwise = bool(own) and own[0][0].is_depthwise
        if self.depthwise:
            kernels = torch.stack([conv.depthwise.weight.detach()[:, 0].T for conv, _ in own])
            kernels = kernels[:, :, None]  # (sites, k, 1, d)
            self.now = kernels[:, -1].unbind(0)
        # alike, and computed at once: a cycle of all blocks; each of the embedding's is alone
        alone = [slice(i, i + 1) for i in range(config.n_embed_cycles)]
        groups = alone + [slice(len(alone) + i, None, self.cycles) for i in range(self.cycles)]
        self.groups = []
        for group in groups if own else ():
            backs = [own[group.start][1] * i for i in range(config.kernel_size - 1, 0, -1)]
            before = kernels[group, :-1].unbind(1) if self.depthwise else ()
            self.groups.append((group, backs, before))
        self.held = torch.empty(0)  # `memory.inputs` when it was last looked at

    def begin(self, at: int) -> None:
        if self.held is not self.memory.inputs:
            self.held = self.memory.inputs
            self.views = [self.held[group] for group, _, _ in self.groups]
        self.at = at = self.memory.reach + at
        self.inputs: list[Tensor] = []  # (B, d) of each convolution that was asked
        self.past: list[Any] = [None] * self.count  # what earlier inputs bring
        for (group, backs, before), held in zip(self.groups, self.views, strict=True):
            taps = [held.select(2, at - back) for back in backs]  # (n, B, d)
            if not taps:
                continue
            if not self.depthwise:
                past = torch.cat(taps, -1)
            else:
                past = taps[0] * before[0]
                for tap, kernel in zip(taps[1:], before[1:], strict=True):
                    past = torch.addcmul(past, tap, kernel)
            self.past[group] = past.unbind(0)

    def __call__(self, x: Tensor, active: Active | None) -> Tensor:
        """What is made of the next input x (n, d) at the token: (n, d), or its k taps (n, k * d).

        x is of the rows that are computed; those not `active` keep their input of the layer before.
        """
        site = len(self.inputs)
        past = self.past[site]
        if active is None:
            self.inputs.append(x)
        elif active.rows is None:
            x = torch.where(active.mask, x, self.inputs[-self.cycles])
            self.inputs.append(x)
        else:
            self.inputs.append(self.inputs[-self.cycles].index_copy(0, active.rows, x))
            past = past if past is None else past[active.rows]
        if not self.depthwise:
            return x if past is None else torch.cat([past, x], -1)
        now = self.now[site]
        return x * now if past is None else torch.addcmul(past, x, now)

    def end(self) -> None:
        """Keep the inputs; layers that were not run have those of the last that was."""
        while len(self.inputs) < self.count:
            self.inputs.append(self.inputs[-self.cycles])
        if self.count:
            self.held.select(2, self.at).copy_(torch.stack(self.inputs))


class Heads:
    """Attention over all tokens so far, without its matrices."""

    def __init__(self, model: CRT, memory: Memory):
        config, like = model.config, model.loop_encoding.detach()
        B, H, D = memory.rows, config.n_heads, config.d_model // config.n_heads
        self.memory, self.rotary = memory, config.positions == "rotary"
        self.kv = torch.empty(0)  # `memory.kv` when it was last looked at
        self.given = like.new_empty(B, 3 * config.d_model)  # for queries, keys and values
        self.heads = like.new_empty(3, B, H, 1, D)  # the same, turned
        self.query, self.pair = self.heads[0].flatten(0, 1), self.heads[1:, :, :, 0]
        self.read, self.by_row = self.given.view(B, 3, H, 1, D), self.heads.transpose(0, 1)
        if self.rotary:
            self.read, self.by_row = (x.view(B, 3, H, 2, D // 2) for x in (self.read, self.by_row))
            self.halves, self.turned = self.read.unbind(3), self.by_row.unbind(3)
            wide = torch.promote_types(like.dtype, torch.float32)
            cos, sin = turns(torch.arange(config.max_seq_len, device=like.device), wide, D)
            # values are turned by nothing
            self.cos = torch.stack([cos, cos, torch.ones_like(cos)], 1)[:, :, None, None].to(like)
            self.sin = torch.stack([sin, sin, torch.zeros_like(sin)], 1)[:, :, None].to(like)

    def begin(self, at: int) -> None:
        kv, starts = self.memory.kv, self.memory.starts
        if self.kv is not kv:
            self.kv = kv
            self.all_keys, self.all_values = kv.flatten(2, 3).unbind(1)  # (layers, B * H, ., D)
            self.all_keys = self.all_keys.mT
        self.slot = kv.select(4, at)  # (layers, 2, B, H, D)
        self.slots = self.slot.unbind(0)
        self.keys = self.all_keys.narrow(3, 0, at + 1).unbind(0)  # (B * H, D, at + 1) a layer
        self.values = self.all_values.narrow(2, 0, at + 1).unbind(0)
        self.mask: Tensor | None = None
        if starts is not None:
            before = torch.arange(at + 1, device=kv.device) < starts[:, None]  # padding
            self.mask = before.repeat_interleave(self.heads.shape[2], 0)[:, None]
        if self.rotary:
            position = at if starts is None else at - starts
            self.turn = self.cos[position], self.sin[position]

    def __call__(self, layer: int, active: Active | None) -> Tensor:
        """What the heads of `layer` read (n, d) for what is first in `given`, with scaled queries.

        That is of the rows that are computed; those not `active` leave the key and value of the
        layer before.
        """
        rows = None if active is None else active.rows
        n = self.memory.rows if rows is None else len(rows)
        self._turn(n, rows)
        slot = self.slots[layer]
        if active is not None and rows is None:
            torch.where(active.mask[:, :, None], self.pair, self.slots[layer - 1], out=slot)
        elif active is None:
            slot.copy_(self.pair)
        if active is None or rows is None:
            return self._attend(layer, self.query, slice(None)).view(n, -1)
        slot.copy_(self.slots[layer - 1]).index_copy_(1, rows, self.pair[:, :n])
        heads, done, found = self.heads.shape[2], 0, []
        for begin, end in active.runs:  # views of the memory, where an index would copy it
            queries = self.query[heads * done :][: heads * (end - begin)]
            found.append(self._attend(layer, queries, slice(heads * begin, heads * end)))
            done += end - begin
        return torch.cat(found).view(n, -1)

    def _turn(self, n: int, rows: Tensor | None) -> None:
        """Turn what is `given` for n rows, of these indices, to their position."""
        if not self.rotary:
            self.by_row[:n].copy_(self.read[:n])
            return
        cos, sin = self.turn
        if rows is not None and self.memory.starts is not None:
            cos, sin = cos[rows], sin[rows]
        (first, second), (low, high) = self.halves, self.turned
        torch.mul(self.read[:n], cos, out=self.by_row[:n])
        low[:n].addcmul_(second[:n], sin, value=-1)
        high[:n].addcmul_(first[:n], sin)

    def _attend(self, layer: int, queries: Tensor, rows: slice) -> Tensor:
        """Of queries (n * H, 1, D) and these rows of keys and values, (n * H, 1, D)."""
        scores = torch.bmm(queries, self.keys[layer][rows])  # (n * H, 1, at + 1)
        if self.mask is not None:
            scores.masked_fill_(self.mask[rows], -torch.inf)
        return torch.bmm(scores.softmax(-1), self.values[layer][rows])
