"""The matvec bound of decoding: the time that the products with the weights take alone."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crt_lib.cached.products import Layout, Product
from crt_lib.model import CRT

Products = list[tuple[Product, Tensor]]  # and what each multiplies


class Reading:
    """The products of one new token of each of `rows` rows, and nothing else.

    Weights are laid out as decoding has them; a loop's are read again by the next. The keys and
    values are of `length` tokens, and every loop has its own.
    """

    def __init__(self, model: CRT, rows: int, length: int):
        config, self.layout = model.config, Layout(rows)
        self.embedding = self._of(model.embed)
        for block in model.prelude:
            self.embedding += self._of(block)
        self.block, last = self._of(model.block), str(config.n_loops)
        narrow = self._of(model.heads[last]) if config.head_sharing == "tied" else []
        _, vocabulary = model.readout(config.n_loops, model.loop_encoding[:1])
        self.head = [*narrow, self._product(vocabulary)]
        heads, width = rows * config.n_heads, config.d_model // config.n_heads
        kept = torch.randn(config.n_loops, 2, heads, length, width).to(model.loop_encoding)
        self.query, self.scores = kept[0, 0, :, :1], kept.new_ones(heads, 1, length)
        self.kept = [(keys.mT, values) for keys, values in kept.unbind(0)]

    def __call__(self, keys_and_values: bool) -> np.ndarray:
        """Seconds of the embedding, of one loop (the mean of all) and of the last head, (3,)."""
        marks = [time.perf_counter()]
        _run(self.embedding)
        marks.append(time.perf_counter())
        for keys, values in self.kept:
            _run(self.block)
            if keys_and_values:
                torch.bmm(self.query, keys)
                torch.bmm(self.scores, values)
        marks.append(time.perf_counter())
        _run(self.head)
        marks.append(time.perf_counter())
        return np.diff(marks) / (1, len(self.kept), 1)

    def _of(self, module: Any) -> Products:
        """Of the matrices that a token meets in a block, embedding or head, repeated ones too."""
        apart = ("tokens", "cycles", "trm")  # looked up, or by cycle
        meets = [own for name, own in module.named_children() if name not in apart] or [module]
        trm = getattr(module, "trm", module)
        for i in range(len(getattr(trm, "dilations", ()))):
            meets.append(trm.cycles[i % len(trm.cycles)])
        return [
            self._product(weight)
            for part in meets
            for name, weight in part.named_parameters()
            if weight.ndim > 1 and "depthwise" not in name
        ]

    def _product(self, weight: Tensor) -> tuple[Product, Tensor]:
        weight = weight.detach().flatten(1)
        x = torch.randn(self.layout.rows, weight.shape[1]).to(weight)
        return self.layout.of(weight, None), x


def _run(products: Products) -> None:
    for product, x in products:
        product(x)
