"""What one new token of each row reads of earlier ones, and leaves: attention and convolutions.

Where all layers write and what they read is found once a token (`begin`), not once a loop; B rows,
H heads of D features. Rows that have left are computed along: those not `active` (B, 1) leave what
the layer before did. `Run` reads and leaves the same for several tokens of one row.
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
            self.before, self.now = kernels[:, :-1], kernels[:, -1].unbind(0)
        device = model.loop_encoding.device
        dilations = torch.tensor([dilation for _, dilation in own], dtype=torch.int64)
        self.sites = torch.arange(self.count, device=device)[:, None]
        back = torch.arange(config.kernel_size - 1, 0, -1) * dilations[:, None]
        self.steps: list[list[int]] = back.tolist()  # back in time, of each tap of each site
        self.back = back.to(device)

    def begin(self, at: int) -> None:
        self.active: Tensor | None = None  # all
        self.at = self.memory.reach + at
        self.inputs: list[Tensor] = []  # (B, d) of each convolution that was asked
        taps = self.memory.inputs.transpose(1, 2)[self.sites, self.at - self.back]
        # what earlier inputs bring: (sites, k - 1, B, d) to (sites, B, d) or (sites, B, k' * d)
        past = (taps * self.before).sum(1) if self.depthwise else taps.transpose(1, 2).flatten(2)
        self.past = past.unbind(0)

    def __call__(self, x: Tensor) -> Tensor:
        """What is made of the next input x (B, d): (B, d), or its k taps (B, k * d)."""
        site = len(self.inputs)
        if self.active is not None:
            x = torch.where(self.active, x, self.inputs[-self.cycles])
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
        B, H, width = memory.rows, config.n_heads, config.d_model // config.n_heads
        self.memory, self.rotary = memory, config.positions == "rotary"
        self.shape, self.halves = (B, 3, H, width), (B, 3, H, 2, width // 2)
        if self.rotary:
            wide = torch.promote_types(like.dtype, torch.float32)
            cos, sin = turns(torch.arange(config.max_seq_len, device=like.device), wide, width)
            # of queries, keys, and values, which are turned by nothing; heads and halves are (H, 2)
            cos = torch.stack([cos, cos, torch.ones_like(cos)], 1)[:, :, None, None]
            sin = torch.stack([sin, sin, torch.zeros_like(sin)], 1)[:, :, None, None]
            self.cos, self.sin = cos.to(like), torch.cat([-sin, sin], 3).to(like)

    def begin(self, at: int) -> None:
        self.active: Tensor | None = None  # all
        memory, starts = self.memory, self.memory.starts
        self.slot = memory.kv.select(4, at)  # (layers, 2, B, H, D)
        self.slots = self.slot.unbind(0)
        # of each layer (B * H, D, at + 1) and (B * H, at + 1, D)
        keys, values = memory.kv[..., : at + 1, :].flatten(2, 3).unbind(1)
        self.keys, self.values = keys.mT.unbind(0), values.unbind(0)
        self.mask: Tensor | None = None
        if starts is not None:
            before = torch.arange(at + 1, device=starts.device) < starts[:, None]  # padding
            self.mask = before.repeat_interleave(self.shape[2], 0)[:, None]
        if self.rotary:
            position = at if starts is None else at - starts
            self.turn = self.cos[position], self.sin[position]

    def __call__(self, layer: int, given: Tensor) -> Tensor:
        """What the heads of `layer` read (B, d), of scaled queries, keys and values (B, 3 * d)."""
        if self.rotary:
            given = turned(given.view(self.halves), *self.turn)
        heads = given.view(self.shape)
        new = heads[:, 1:].transpose(0, 1)  # (2, B, H, D)
        if self.active is not None:
            new = torch.where(self.active[..., None], new, self.slots[layer - 1])
        self.slots[layer].copy_(new)
        query = heads[:, 0].reshape(len(self.keys[layer]), 1, -1)
        scores = torch.bmm(query, self.keys[layer])  # (B * H, 1, at + 1)
        if self.mask is not None:
            scores.masked_fill_(self.mask, -torch.inf)
        return torch.bmm(scores.softmax(-1), self.values[layer]).view(len(heads), -1)


def turned(halves: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries, keys and values (..., 3, H, 2, D / 2), each pair of features turned."""
    return torch.addcmul(halves * cos, halves.flip(3), sin)


class Token:
    """One new token of each row, for all layers in turn."""

    def __init__(self, model: CRT, memory: Memory):
        self.attend, self.convolve = Heads(model, memory), Convolutions(model, memory)

    def begin(self, at: int) -> None:
        self.attend.begin(at)
        self.convolve.begin(at)

    def keep(self, active: Tensor) -> None:
        """From now on rows that are not `active` (B, 1) leave what the layer before did."""
        self.attend.active = self.convolve.active = active


class Run:
    """n tokens of one row from position `at` on, for all layers in turn from number `first` on.

    `first` counts as `Memory.kv`, -1: the embedding. None of the tokens has left, and the row has
    no padding.
    """

    def __init__(self, token: Token, first: int, at: int, n: int):
        self.heads, self.convolutions = token.attend, token.convolve
        self.memory, self.begin, self.end = token.attend.memory, at, at + n
        left = self.convolutions.cycles * (len(self.memory.kv) - first)
        self.site = 0 if first < 0 else self.convolutions.count - left
        to = torch.arange(self.end, device=self.memory.kv.device)
        self.mask = to > to[at:, None]  # (n, end)
        if self.heads.rotary:
            self.turn = self.heads.cos[at : self.end], self.heads.sin[at : self.end]

    def convolve(self, x: Tensor) -> Tensor:
        """As `Convolutions`, of x (n, d)."""
        own, site, memory = self.convolutions, self.site, self.memory
        begin, end = memory.reach + self.begin, memory.reach + self.end
        held = memory.inputs[site, 0]
        held[begin:end] = x
        self.site += 1
        taps = [held[begin - back : end - back] for back in own.steps[site]]
        if not own.depthwise:
            return torch.cat([*taps, x], -1)
        y = x * own.now[site]
        for tap, kernel in zip(taps, own.before[site], strict=True):
            y = torch.addcmul(y, tap, kernel)
        return y

    def attend(self, layer: int, given: Tensor) -> Tensor:
        """As `Heads`, of (n, 3 * d)."""
        n, (_, *halves) = len(given), self.heads.halves
        if self.heads.rotary:
            given = turned(given.view(n, *halves), *self.turn)
        heads = given.view(n, *self.heads.shape[1:]).permute(1, 2, 0, 3)  # (3, H, n, D)
        held = self.memory.kv[layer, :, 0, :, : self.end]  # (2, H, end, D)
        held[..., self.begin :, :] = heads[1:]
        scores = torch.bmm(heads[0], held[0].mT).masked_fill_(self.mask, -torch.inf)
        return torch.bmm(scores.softmax(-1), held[1]).transpose(0, 1).reshape(n, -1)
