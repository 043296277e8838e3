"""What one new token of each row reads of earlier ones, and leaves: attention and convolutions.

The parts of `step` that touch the memory. Where all layers write and what they read is
found once a token (`begin`), not once a loop; B rows, H heads of D features.
"""

import torch
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.kernels import turns
from crt_lib.model import CRT


class Convolutions:
    """All convolutions over time at one token, asked in the order of `Memory.layers`."""

    def __init__(self, model: CRT, memory: Memory):
        config, blocks = model.config, [*model.prelude, *[model.block] * model.config.n_loops]
        self.memory, self.cycles = memory, config.n_cycles
        own, dilations = [], []
        for trm in (model.embed, *(block.trm for block in blocks)):
            for i, dilation in enumerate(trm.dilations if config.trm != "linear" else ()):
                own.append(trm.cycles[i % len(trm.cycles)].conv)
                dilations.append(dilation)
        self.count, device = len(own), memory.inputs.device
        self.sites = torch.arange(self.count, device=device)[:, None]
        steps = torch.arange(1 - config.kernel_size, 0, device=device)
        self.taps = torch.tensor(dilations, device=device)[:, None] * steps  # (sites, k - 1)
        self.depthwise = bool(own) and own[0].is_depthwise
        if self.depthwise:
            kernels = torch.stack([conv.depthwise.weight.detach()[:, 0].T for conv in own])
            self.before, self.now = kernels[:, :-1, None], kernels[:, -1].unbind(0)

    def begin(self, at: int) -> None:
        self.inputs: list[Tensor] = []  # (B, d) of each convolution that was asked
        self.at = at = self.memory.reach + at
        if self.count:
            past = self.memory.inputs[self.sites, :, at + self.taps]  # (sites, k - 1, B, d)
            past = (
                (past * self.before).sum(1) if self.depthwise else past.transpose(1, 2).flatten(2)
            )
            self.past = past.unbind(0)

    def __call__(self, x: Tensor, active: Tensor | None) -> Tensor:
        """What is made of the next input x (B, d) at the token: (B, d), or its k taps (B, k * d).

        Rows that are not `active` (B, 1) keep the input that they had in the layer before.
        """
        site = len(self.inputs)
        if active is not None:
            x = torch.where(active, x, self.inputs[-self.cycles])
        self.inputs.append(x)
        if self.depthwise:
            return torch.addcmul(self.past[site], x, self.now[site])
        return torch.cat([self.past[site], x], -1)

    def end(self) -> None:
        """Keep the inputs; layers that were not run have those of the last that was."""
        while len(self.inputs) < self.count:
            self.inputs.append(self.inputs[-self.cycles])
        if self.count:
            self.memory.inputs.select(2, self.at).copy_(torch.stack(self.inputs))


class Heads:
    """Attention over all tokens so far, without its matrices."""

    def __init__(self, model: CRT, memory: Memory):
        config, like = model.config, model.loop_encoding.detach()
        B, H, D = memory.rows, config.n_heads, config.d_model // config.n_heads
        self.memory, self.rotary = memory, config.positions == "rotary"
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
        self.slot = kv.select(4, at)  # (layers, 2, B, H, D)
        self.slots = self.slot.unbind(0)
        keys, values = kv.narrow(4, 0, at + 1).flatten(2, 3).unbind(1)  # (layers, B * H, at + 1, D)
        self.keys, self.values = keys.mT.unbind(0), values.unbind(0)
        self.mask: Tensor | None = None
        if starts is not None:
            before = torch.arange(at + 1, device=kv.device) < starts[:, None]  # padding
            self.mask = before.repeat_interleave(self.heads.shape[2], 0)[:, None]
        if self.rotary:
            position = at if starts is None else at - starts
            self.turn = self.cos[position], self.sin[position]

    def __call__(self, layer: int, active: Tensor | None) -> Tensor:
        """What the heads of `layer` read (B, d) for what is in `given`, with scaled queries.

        Rows that are not `active` (B, 1) leave the key and value of the layer before.
        """
        if self.rotary:
            (cos, sin), (first, second) = self.turn, self.halves
            torch.mul(self.read, cos, out=self.by_row)
            self.turned[0].addcmul_(second, sin, value=-1)
            self.turned[1].addcmul_(first, sin)
        else:
            self.by_row.copy_(self.read)
        if active is None:
            self.slots[layer].copy_(self.pair)
        else:
            before = self.slots[layer - 1]
            torch.where(active[:, :, None], self.pair, before, out=self.slots[layer])
        scores = torch.bmm(self.query, self.keys[layer])  # (B * H, 1, at + 1)
        if self.mask is not None:
            scores.masked_fill_(self.mask, -torch.inf)
        return torch.bmm(scores.softmax(-1), self.values[layer]).view(len(self.given), -1)
