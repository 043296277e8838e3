"""Matrix products of a few rows, with the weight laid out as the processor multiplies it fastest.

Decoding multiplies every weight with one row a text, so it takes the time of reading the weights.
One row reads a transposed copy up to twice as fast as the matrix that a layer holds; more rows
multiply oneDNN's own order two or three times as fast. A copy takes the memory of the weight again.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Branch = Callable[[Tensor, Tensor], Tensor]  # (h, x) to h + what is made of x


class Product:
    """x -> x @ weight.T + bias, x (B, in), in the layout that a layer has; nothing is copied."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def into(self, out: Tensor, x: Tensor) -> None:
        """The product in the place of `out` (B, out)."""
        out.copy_(self(x))

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        """h + the product, h (B, out)."""
        return h + self(x)

    def gelu(self, x: Tensor) -> Tensor:
        """gelu(the product)."""
        return F.gelu(self(x))


class Transposed(Product):
    """Of one row: the weight is a contiguous (in, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.t().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def into(self, out: Tensor, x: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        y = torch.addmm(h, x, self.weight)
        return y if self.bias is None else y.add_(self.bias)


class Packed(Product):
    """Of several rows: the weight is in oneDNN's order for them, as torch.compile has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), bias)
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_and = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias, "none", [], "")

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        return self._linear_and(x, h, self.weight, self.bias, "add")

    def gelu(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias, "gelu", [], "none")


def mlp(up: nn.Linear, down: nn.Linear, gated: bool, rows: int) -> Branch:
    """(h, x) -> h + down(gelu(up(x))), or with silu(gate) * value in the middle; (B, d) each."""
    first, second = product(up, rows), product(down, rows)
    if gated:

        def apply(h: Tensor, x: Tensor) -> Tensor:
            gate, value = first(x).chunk(2, -1)
            return second.add(h, F.silu(gate) * value)
    elif isinstance(first, Transposed):
        return _row_mlp(first, second)
    else:

        def apply(h: Tensor, x: Tensor) -> Tensor:
            return second.add(h, first.gelu(x))

    return apply


def _row_mlp(first: Transposed, second: Transposed) -> Branch:
    """Three operations: the second bias is one more row of its weight, of a feature that is 1."""
    back = torch.cat([second.weight, second.bias[None]])
    hidden, middle = back.new_empty(1, len(back) - 1), back.new_ones(1, len(back))
    # as transposes: torch then leaves gelu to its own kernel; a call of oneDNN's takes longer
    into, out_of = (x.view(2, -1).t() for x in (middle[:, :-1], hidden))

    def apply(h: Tensor, x: Tensor) -> Tensor:
        torch.addmm(first.bias, x, first.weight, out=hidden)
        F.gelu(out_of, out=into)
        return torch.addmm(h, middle, back)

    return apply


def product(layer: nn.Linear, rows: int) -> Product:
    """The product of a layer and `rows` rows, in the layout that is fastest for them here."""
    bias = None if layer.bias is None else layer.bias.detach()
    return product_of(layer.weight.detach(), bias, rows)


def product_of(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """As `product`, of a weight (out, in) and a bias (out,)."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return Product(weight, bias)
    if rows == 1:
        return Transposed(weight, bias)
    has_packed = torch.backends.mkldnn.is_available() and weight.dtype == torch.float32
    return Packed(weight, bias, rows) if has_packed else Product(weight, bias)
