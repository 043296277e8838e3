"""The layers' own kernels against what they replace: shifted sums, dropout, recomputation."""

import pytest
import torch
import torch.nn.functional as F
from closeness import same
from hypothesis import given, strategies as st

from crt_lib.kernels import Dropout, ShiftedSum


@given(
    T=st.integers(1, 9),
    k=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 8),
    left=st.booleans(),
)
def test_shifted_sum_is_a_depthwise_convolution(T, k, dilation, left):
    torch.manual_seed(0)
    h = torch.randn(2, T, 4, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(k, 4, dtype=torch.float64, requires_grad=True)
    before = (k - 1 if left else k // 2) * dilation
    after = (k - 1) * dilation - before
    padded = F.pad(h, (0, 0, before, after)).transpose(1, 2)
    plain = F.conv1d(padded, kernels.T[:, None], dilation=dilation, groups=4).transpose(1, 2)
    ours = ShiftedSum.apply(h, kernels, [i * dilation - before for i in range(k)])
    same(ours, plain)
    gradient = torch.randn_like(plain)
    same(*(torch.autograd.grad(y, (h, kernels), gradient) for y in (ours, plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_its_share_scales_it_and_passes_its_gradient(dtype):
    torch.manual_seed(0)
    x = torch.ones(100, 1001, dtype=dtype, requires_grad=True)
    y = Dropout(0.3)(x)
    kept = y.detach() != 0
    assert torch.equal(y.detach(), kept * torch.tensor(1 / 0.7, dtype=dtype))
    # a share of n draws is within 5 standard deviations sqrt(p (1 - p) / n)
    assert abs(kept.double().mean().item() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    x, layer = torch.randn(5, 7), Dropout(0.5)

    def drawn(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(1) == 0, layer(x) == 0)  # the next call draws anew
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x
