"""The matvec bound of decoding: the time that the products with the weights take alone."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from crt_lib.cached.products import Layout
from crt_lib.model import CRT
from crt_lib.runs.machine import wait

Products = list[tuple[Callable[[Tensor], Tensor], Tensor]]  # and what each multiplies


class Reading:
    """The products of one new token of each of `rows` rows, and nothing else.

    Weights are laid out as decoding has them; a loop's are read again by the next. The keys and
    values are of `length` tokens, and every loop has its own.
    """

    def __init__(self, model: CRT, rows: int, length: int):
        config, self.layout, last = model.config, Layout(rows), model.config.n_loops
        self.device = model.loop_encoding.device.type
        shared = config.share_cycle_weights
        own, others = (n if shared else 1 for n in (config.n_cycles, config.n_embed_cycles))
        self.embedding = self._of(model.embed, others)
        for block in model.prelude:
            self.embedding += self._of(block, own)
        self.block, self.loops = self._of(model.block, own), last
        narrow = self._of(model.heads[str(last)]) if config.head_sharing == "tied" else []
        _, vocabulary = model.readout(last, model.loop_encoding[:1])
        self.head = [*narrow, self._product(vocabulary)]
        heads, width = rows * config.n_heads, config.d_model // config.n_heads
        kept = torch.randn(last, 2, heads, length, width).to(model.loop_encoding)
        attend = (
            partial(torch.bmm, kept[0, 0, :, :1]),
            partial(torch.bmm, kept.new_ones(heads, 1, length)),
        )
        self.kept: Products = [
            of
            for keys, values in kept.unbind(0)
            for of in zip(attend, (keys.mT, values), strict=True)
        ]

    def __call__(self) -> np.ndarray:
        """Seconds of embedding, one loop, its keys and values (means of all), last head, (4,)."""
        marks = [time.perf_counter()]
        for products in (self.embedding, self.block * self.loops, self.kept, self.head):
            for product, x in products:
                product(x)
            wait(self.device)
            marks.append(time.perf_counter())
        return np.diff(marks) / (1, self.loops, self.loops, 1)

    def _of(self, module: nn.Module, cycles: int = 1) -> Products:
        """Of the matrices that a token meets in a module, a shared cycle's as often as it runs."""
        return [
            self._product(weight)
            for name, weight in module.named_parameters()
            for _ in range(cycles if "cycles." in name else 1)
            if weight.ndim > 1 and not name.startswith("tokens.") and "depthwise." not in name
        ]

    def _product(self, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        weight = weight.detach().flatten(1)
        x = torch.randn(self.layout.rows, weight.shape[1]).to(weight)
        return self.layout.of(weight, None), x
