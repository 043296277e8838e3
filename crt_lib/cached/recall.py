"""What one new token of each row reads of earlier ones, and leaves: attention and convolutions.

The parts of `step` that touch the memory. Where all layers write and what they read is
found once a token (`begin`), not once a loop; B rows, H heads of D features.
"""

from typing import Any

import torch
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.kernels import turns
from crt_lib.model import CRT


class Convolutions:
    """All convolutions over time at one token.

    `sites`: of each block that is applied, the embedding last, where its cycles are in the memory.
    """

    def __init__(self, model: CRT, memory: Memory):
        self.memory, self.taps = memory, range(model.config.kernel_size - 1)
        layers = (*memory.prelude, *memory.loops, memory.embedding)
        self.sites = [[conv.site for conv in layer.convolutions] for layer in layers]
        trms = [block.trm for block in (*model.prelude, *[model.block] * model.config.n_loops)]
        trms.append(model.embed)
        own = []
        for conv in memory.convolutions:
            cycles = trms[conv.layer.index].cycles
            own.append(cycles[conv.cycle % len(cycles)].conv)
        reaches = [conv.reach for conv in memory.convolutions]
        self.groups = [(reaches.index(r), reaches.count(r), r) for r in sorted(set(reaches))]
        self.depthwise = bool(own) and own[0].is_depthwise
        if self.depthwise:
            kernels = torch.stack([conv.depthwise.weight.detach()[:, 0].T for conv in own])
            kernels = kernels[:, :, None]  # (sites, k, 1, d)
            self.now = kernels[:, -1].unbind(0)
            self.before = [kernels.narrow(0, at, n).unbind(1) for at, n, _ in self.groups]
        self.held = torch.empty(0)  # `memory.inputs` when it was last looked at

    def begin(self, at: int) -> None:
        memory = self.memory
        if self.held is not memory.inputs:
            self.held = memory.inputs
            self.of_group = [self.held.narrow(0, first, count) for first, count, _ in self.groups]
        self.at = at = memory.reach + at
        self.inputs = [self.held] * len(memory.convolutions)  # each is put in before it is read
        self.past: list[Any] = []  # what earlier inputs bring: (B, d) a site, or k - 1 of them
        for index, (held, (_, _, reach)) in enumerate(zip(self.of_group, self.groups, strict=True)):
            step = reach // max(len(self.taps), 1)
            taps = [held.select(2, at - reach + tap * step) for tap in self.taps]  # (n, B, d)
            if not self.depthwise:
                self.past += zip(*(tap.unbind(0) for tap in taps), strict=True)
            elif taps:
                kernels = self.before[index]
                past = taps[0] * kernels[0]
                for tap, kernel in zip(taps[1:], kernels[1:], strict=False):
                    past = torch.addcmul(past, tap, kernel)
                self.past += past.unbind(0)

    def __call__(self, x: Tensor, layer: int, cycle: int, active: Tensor | None) -> Tensor:
        """What is made of the input x (B, d) at the token: (B, d), or its k taps (B, k * d).

        Rows that are not `active` (B, 1) keep the input that they had in the layer before.
        """
        site = self.sites[layer][cycle]
        if active is not None:
            x = torch.where(active, x, self.inputs[self.sites[layer - 1][cycle]])
        self.inputs[site] = x
        if not self.taps:
            return x * self.now[site] if self.depthwise else x
        if self.depthwise:
            return torch.addcmul(self.past[site], x, self.now[site])
        return torch.cat([*self.past[site], x], -1)

    def end(self, run: int) -> None:
        """Keep the inputs; layers after the first `run` were not run and have those of the last."""
        if not self.inputs:
            return
        for layer in self.sites[run:-1]:
            for site, other in zip(layer, self.sites[run - 1], strict=True):
                self.inputs[site] = self.inputs[other]
        self.held.select(2, self.at).copy_(torch.stack(self.inputs))


class Heads:
    """Attention over all tokens so far, without its matrices."""

    def __init__(self, model: CRT, memory: Memory):
        config, like = model.config, model.loop_encoding.detach()
        B, H, D = memory.rows, config.n_heads, config.d_model // config.n_heads
        self.memory = memory
        self.kv = torch.empty(0)  # `memory.kv` when it was last looked at
        self.given = like.new_empty(B, 3 * config.d_model)  # for queries, keys and values
        self.heads = like.new_empty(3, B, H, 1, D)  # the same, turned
        self.query, self.pair = self.heads[0].flatten(0, 1), self.heads[1:, :, :, 0]
        self.read, self.by_row = self.given.view(B, 3, H, 1, D), self.heads.transpose(0, 1)
        self.rotary = config.positions == "rotary"
        if self.rotary:
            self.read, self.by_row = (x.view(B, 3, H, 2, D // 2) for x in (self.read, self.by_row))
            self.halves, self.turned = self.read.unbind(3), self.by_row.unbind(3)
            wide = torch.promote_types(like.dtype, torch.float32)
            cos, sin = turns(torch.arange(config.max_seq_len, device=like.device), wide, D)
            self.cos = torch.stack([cos, cos, torch.ones_like(cos)], 1)[:, :, None, None].to(like)
            self.sin = torch.stack([sin, sin, torch.zeros_like(sin)], 1)[:, :, None].to(like)

    def begin(self, at: int) -> None:
        kv, starts = self.memory.kv, self.memory.starts
        if self.kv is not kv:
            self.kv = kv
            self.all_keys = kv[:, 0].flatten(1, 2).mT  # (layers, B * H, D, capacity)
            self.all_values = kv[:, 1].flatten(1, 2)
        self.slot = kv.select(4, at)  # (layers, 2, B, H, D)
        self.slots = self.slot.unbind(0)
        self.keys = self.all_keys.narrow(3, 0, at + 1).unbind(0)  # (B * H, D, at + 1) a layer
        self.values = self.all_values.narrow(2, 0, at + 1).unbind(0)
        self.mask: Tensor | None = None
        if starts is not None:
            before = torch.arange(at + 1, device=kv.device) < starts[:, None]  # padding
            self.mask = before.repeat_interleave(self.heads.shape[2], 0)[:, None]
            if self.rotary:
                self.turn = self.cos[at - starts], self.sin[at - starts]
        elif self.rotary:
            self.turn = self.cos.select(0, at), self.sin.select(0, at)

    def __call__(self, layer: int, active: Tensor | None) -> Tensor:
        """What the heads of `layer` read (B, d) for what is in `given`, with scaled queries.

        Rows that are not `active` (B, 1) leave the key and value of the layer before.
        """
        if self.rotary:
            (cos, sin), (first, second) = self.turn, self.halves
            torch.mul(self.read, cos, out=self.by_row)  # values are turned by nothing
            self.turned[0].addcmul_(second, sin, value=-1)
            self.turned[1].addcmul_(first, sin)
        else:
            self.by_row.copy_(self.read)
        if active is None:
            self.slots[layer].copy_(self.pair)
        else:
            before, kept = self.slots[layer - 1], active[:, :, None]  # (B, 1, 1)
            torch.where(kept, self.pair, before, out=self.slots[layer])
        scores = torch.bmm(self.query, self.keys[layer])  # (B * H, 1, at + 1)
        if self.mask is not None:
            scores.masked_fill_(self.mask, -torch.inf)
        return torch.bmm(scores.softmax(-1), self.values[layer]).view(len(self.given), -1)

    def end(self, run: int, more: int) -> None:
        """The `more` layers after the first `run` take over what the last of these left."""
        if more:
            self.slot[run : run + more] = self.slot[run - 1]
