"""Matrix products of a few rows, with the weight laid out as the processor multiplies it fastest.

Decoding takes the time of reading the weights. A transposed copy is read up to twice as fast as the
matrix that a layer holds, and takes its memory again; in 8 bits a quarter of it, and large ones are
faster.
"""

import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.files import InputError

QUANTIZE = ("int8",)
# Elements from which a product in 8 bits takes less time than in 32, the rounding of x included.
LARGE, LARGE_FOR_ROWS = 1 << 19, 1 << 16


class Product:
    """x -> x @ weight + bias, x (B, in), or (B, n, in) without a bias; weight (in, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        return torch.addmm(self.bias, x, self.weight)

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        """h + the product, h (B, out)."""
        y = torch.addmm(h, x, self.weight)
        return y if self.bias is None else y.add_(self.bias)


class Quantized(Product):
    """The weight in 8 bits with a scale an output; x is rounded too, with one scale for all rows.

    Sums are exact, in 32 bits. x has 7 of the bits: no processor's 16-bit steps then overflow.
    Weights (out, in) are given as a layer has them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        scales = weight.abs().amax(1).double().clamp(min=1e-12) / 127
        none = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to replace it; this version has nothing else
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(weight, scales, none, 0, torch.qint8)
        super().__init__(torch.ops.quantized.linear_prepack(rounded, bias))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.weight, reduce_range=True)

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        return h + self(x)


class FinelyQuantized(Quantized):
    """The weight in 8 bits, x in two parts of 7: the rounded one, and what that left out.

    Both parts are whole numbers from -63 to 63. One more feature, of weight 0, is -63 and 64, so
    that the product's own rounding has a step of 1 and leaves them alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        super().__init__(F.pad(weight, (0, 1)), None)
        self.added = bias
        self.parts = weight.new_zeros(2 * rows, weight.shape[1] + 1)
        self.parts[0, -1], self.parts[-1, -1] = -63, 64
        self.coarse, self.fine = self.parts[:, :-1].chunk(2)

    def __call__(self, x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True).clamp_(min=1e-12) / 63
        steps = x / step
        torch.round(steps, out=self.coarse)
        torch.mul(steps.sub_(self.coarse), 126, out=self.fine)
        coarse, fine = super().__call__(self.parts).chunk(2)
        y = coarse.add_(fine, alpha=1 / 126).mul_(step)
        return y if self.added is None else y.add_(self.added)


@dataclass(frozen=True)
class Layout:
    """How weights are laid out for `rows` rows; with `quantize` "int8" the large ones in 8 bits.

    Raises InputError where 8 bits are not to be had: another device, precision or build of torch.
    """

    rows: int
    quantize: str | None = None
    sizes: list[int] = field(default_factory=list)  # bytes of each weight laid out

    def of(self, weight: Tensor, bias: Tensor | None, vocabulary: bool = False) -> Product:
        """Of a weight (out, in) and a bias (out,); in 8 bits a `vocabulary` has x in two parts."""
        if self.quantize is not None:
            check_quantize(self.quantize, weight)
            if weight.numel() >= (LARGE if self.rows == 1 else LARGE_FOR_ROWS):
                self.sizes.append(weight.numel() + 8 * len(weight))
                if vocabulary:
                    return FinelyQuantized(weight, bias, self.rows)
                return Quantized(weight, bias)
        self.sizes.append(weight.nbytes)
        return Product(weight.t().contiguous() if wide_on_cpu(weight) else weight.t(), bias)

    def layer(self, layer: nn.Linear, vocabulary: bool = False) -> Product:
        """The product of a layer."""
        bias = None if layer.bias is None else layer.bias.detach()
        return self.of(layer.weight.detach(), bias, vocabulary)


def wide_on_cpu(x: Tensor) -> bool:
    """Whether x is in float32 or float64 on a CPU: where numpy and a layout of our own are used."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def check_quantize(quantize: str, weight: Tensor) -> None:
    """Raise InputError if a weight like this one cannot be quantized so here."""
    if quantize not in QUANTIZE:
        raise InputError(f"quantize is {quantize!r}; it must be one of {', '.join(QUANTIZE)}")
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise InputError(
            f"int8 needs float32 weights on a CPU; these are {dtype} on {weight.device}"
        )
    if torch.backends.quantized.engine == "none":
        raise InputError("int8 needs a torch with a quantized engine; this build has none")
