"""How near two results must be: bounds that follow from what is computed, not from what passed.

- **The same sums in another order** (cached or not, alone or in a batch, in chunks or whole, fast
  or plain): models are `double()`, and `same` allows 1e-10 of the largest value. In float64 a sum
  of n terms errs by at most n * 2.2e-16 of them, and no result here passes through 10,000 sums in
  a row; a wrong formula errs by far more. `SAME` is the bound for `pytest.approx`. Greedy tokens
  and exits by threshold are compared in float64 too: there no two scores are that near by chance.
- **What exists in float32 only** (read from a checkpoint or a trace, torch's own chunked loss):
  `roundings(n)` is the bound of n roundings in a row, each of half an ulp on both sides, and
  `near` asks it of the largest value. n is counted where it is used: the terms of the longest sum.
  `OF_A_MODEL` counts a whole pass of a smoke-sized model: 4 loops of about 500.
- **Float32 itself**, as users run it: `as_accurate` allows it 8 times the error that the plain
  formula has in float32, both against float64. Both errors come from the same amplification.
- **bfloat16** has `roundings(n, torch.bfloat16)`.
- **Bits** (`torch.equal`, `==`): only for what is read back, copied, multiplied by 0 and 1, or
  computed twice by the same operations on the same shapes, such as a training that was resumed and
  the logits before a token that changed. Not for what a model read from a file computes: its
  weights may lie at other addresses, for which the kernels add in another order.
- **Samples** have bounds in standard errors, five or more, and a fixed seed.
- Python and numpy floats are float64: `pytest.approx` as it comes, 1e-6, allows for the digits
  that a file keeps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

EXACT = 1e-10
SAME = {"rel": EXACT, "abs": EXACT}
OF_A_MODEL = 2_000


def roundings(count: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest relative difference that `count` roundings in a row make between two results."""
    return count * torch.finfo(dtype).eps


def same(found: Any, expected: Any, name: object = "") -> None:
    """Both are float64 and of one shape, and differ by at most 1e-10 of the larger of 1 and the
    largest value; of mappings and sequences, each member.
    """
    if _members(found, expected, same, name):
        return
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.dtype == expected.dtype == torch.float64, (name, found.dtype, expected.dtype)
    _compare(found, expected, EXACT, name)


def near(found: Any, expected: Any, count: int, name: object = "") -> None:
    """As `same`, in the precision that `found` has, for `count` roundings in a row."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    _compare(found.double(), expected.double(), roundings(count, found.dtype), name)


def as_accurate(found: Any, plain: Any, exact: Any, name: object = "") -> None:
    """`found` is at most 8 times as far from `exact`, in float64, as `plain` is, or 8 ulps."""
    if _members(found, plain, lambda f, p, key: as_accurate(f, p, exact[key], key), name):
        return
    assert found.dtype == plain.dtype and found.shape == exact.shape, name
    found, plain = found.detach(), plain.detach()
    allowed = max((plain - exact).abs().max().item(), _scale(exact) * roundings(1, found.dtype))
    error = (found - exact).abs().max().item()
    assert error <= 8 * allowed, (name, error, allowed)


def _members(found: Any, expected: Any, compare: Any, name: object) -> bool:
    """Whether they are mappings or sequences, whose members are then compared."""
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), name
        for key in expected:
            compare(found[key], expected[key], key)
    elif isinstance(expected, Sequence):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            compare(one, other, name or i)
    return isinstance(expected, Mapping | Sequence)


def _compare(found: torch.Tensor, expected: torch.Tensor, bound: float, name: object) -> None:
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    error = (found - expected).abs().max().item() if found.numel() else 0.0
    assert error <= bound * _scale(expected), (name, error)


def _scale(expected: torch.Tensor) -> float:
    """The larger of 1 and the largest value."""
    return max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
