"""Muon against torch's own, and its Newton-Schulz iteration against the plain one in float64."""

import pytest
import torch
from closeness import same
from hypothesis import given, strategies as st

from crt_lib import optim
from crt_lib.optim import COEFFICIENTS, EPS, ITERATIONS, Muon, orthogonalise

SHAPES = [(8, 8), (8, 24), (24, 8), (12, 60), (60, 12), (1, 9), (9, 1), (8, 24)]


def plain(x):
    """The iteration as torch.optim.Muon writes it, in the precision of x (m, n)."""
    a, b, c = COEFFICIENTS
    x = x / x.norm().clamp(min=EPS)
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if wide else x


def matrices(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@given(m=st.integers(1, 20), n=st.integers(1, 60), rank=st.integers(1, 20), seed=st.integers(0, 9))
def test_iteration_is_the_plain_one(m, n, rank, seed):
    left, right = matrices([(m, rank), (rank, n)], seed)
    x = (left @ right).double()
    same(orthogonalise(x[None])[0], plain(x))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_in_less_precision_it_stays_near(dtype, bound):
    """The worst case of a product with itself, nearly of low rank: float32 keeps 1e-7 of the
    largest square. bfloat16 is as near as torch's, for a matrix of full rank.
    """
    left, right, noise = matrices([(64, 4), (4, 256), (64, 256)])
    x = left @ right + 1e-4 * noise if dtype == torch.float32 else noise
    exact = plain(x.double())
    assert (orthogonalise(x.to(dtype)[None])[0] - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("stacked", [1, 1 << 20])
def test_steps_are_those_of_torch(monkeypatch, stacked):
    """With torch's iteration turned to float64; a step moves a matrix by 0.2 sqrt(max(m, n))."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    import torch.optim._muon as theirs

    monkeypatch.setattr(theirs, "_zeropower_via_newtonschulz", lambda grad, *_: plain(grad))
    monkeypatch.setattr(optim, "STACKED", stacked)
    own = [torch.nn.Parameter(x.double()) for x in matrices(SHAPES)]
    other = [torch.nn.Parameter(x.detach().clone()) for x in own]
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = Muon(own, dtype=torch.float64, **options)
    torchs = torch.optim.Muon(other, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(own, other, strict=True)):
            if step != i % 4:  # one without a gradient in each step
                (p.grad,) = (x.double() for x in matrices([p.shape], step + i))
                q.grad = p.grad.clone()
        ours.step()
        torchs.step()
        ours.zero_grad()
        torchs.zero_grad()
    for p, q in zip(own, other, strict=True):
        same(p, q)
        same(ours.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"])


def test_only_matrices():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
