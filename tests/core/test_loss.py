"""The chunked losses against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from closeness import near, roundings, same

from crt_lib import loss as loss_module
from crt_lib.loss import exit_losses, total_loss


@pytest.fixture(params=["fused", "whole", "torch", "checkpointed"])
def path(request, monkeypatch):
    """Each way the loss can be computed; seven rows of logits at once where it is chunked.

    Torch's own chunks add in float32, whatever they are given.
    """
    if request.param == "torch" and not loss_module._TORCH_CHUNKS:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(loss_module, "_TORCH_CHUNKS", request.param == "torch")
    monkeypatch.setattr(loss_module, "FUSED_ROWS", 7)
    if request.param != "fused":
        monkeypatch.setattr(loss_module, "FUSED", False)
    if request.param in ("torch", "checkpointed"):
        monkeypatch.setattr(loss_module, "WHOLE_ELEMENTS", 0)
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 7 * 31)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_cross_entropy_of_full_logits(path, reduction):
    torch.manual_seed(0)
    dtype = torch.float32 if path == "torch" else torch.float64
    features, weight = (
        torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 11, 8), (31, 8))
    )
    targets = torch.randint(31, (3, 11))
    targets[0, :4] = -100
    scale = torch.randn(3, 11, dtype=dtype) if reduction == "none" else 0.7

    ours = exit_losses([features], weight, targets, reduction)[0]
    grads = torch.autograd.grad((ours * scale).sum(), (features, weight))
    logits = F.linear(features, weight).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
    plain = plain.view(ours.shape)
    expected = torch.autograd.grad((plain * scale).sum(), (features, weight))

    if path != "torch":
        return same((ours, *grads), (plain, *expected))
    for found, wanted in zip((ours, *grads), (plain, *expected), strict=True):
        near(found, wanted, 8 + 31 + 33)  # features, vocabulary, positions


def test_half_precision_autocast_is_close(path):
    torch.manual_seed(0)
    features, weight = (torch.randn(n, 8, requires_grad=True) for n in (40, 31))
    targets = torch.randint(31, (40,))
    plain = F.cross_entropy(features @ weight.T, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = exit_losses([features.bfloat16()], weight, targets)[0]
    assert half.dtype == torch.float32
    # two rounded factors and a rounded product
    assert half.item() == pytest.approx(plain.item(), rel=roundings(3, torch.bfloat16))


def test_total_loss_is_equation_5():
    losses = dict(zip((2, 4, 6, 8), torch.tensor([4.0, 3.0, 2.0, 1.0]), strict=True))
    assert total_loss(losses, 0.3).item() == pytest.approx(0.7 * 1.0 + 0.3 * 3.0, rel=roundings(6))
    assert total_loss({8: torch.tensor(1.5)}, 0.3).item() == 1.5


def loss_and_gradients(features, weight, targets, fused: bool, scale: float = 0.7) -> list:
    """The mean loss and the gradients of `scale` times it, fused or by torch."""
    features, weight = (value.clone().requires_grad_() for value in (features, weight))
    if fused:
        loss = exit_losses([features], weight, targets)[0]
        assert "FusedMean" in loss.grad_fn.name()
    else:
        logits = F.linear(features, weight).flatten(0, -2)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    return [loss, *torch.autograd.grad(scale * loss, (features, weight))]


def loss_case(shape: tuple[int, ...], vocabulary: int) -> tuple:
    """Features and vocabulary matrix in float64, and targets of which a third is ignored."""
    generator = torch.Generator().manual_seed(0)
    features, weight = (
        torch.randn(*size, 12, generator=generator, dtype=torch.float64)
        for size in (shape, (vocabulary,))
    )
    targets = torch.randint(vocabulary, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.3
    ignored.view(-1)[0] = False
    return features, weight, targets.masked_fill(ignored, -100)


SHAPES = [((1,), 31), ((5,), 1), ((256,), 31), ((257,), 37), ((3, 100), 101), ((2, 307), 523)]


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(("shape", "vocabulary"), SHAPES)
def test_fused_loss_is_cross_entropy(shape, vocabulary, rows, monkeypatch):
    if rows:
        monkeypatch.setattr(loss_module, "FUSED_ROWS", rows)
    case = loss_case(shape, vocabulary)
    same(loss_and_gradients(*case, fused=True), loss_and_gradients(*case, fused=False))


@pytest.mark.parametrize("half_features", [True, False])
@pytest.mark.parametrize(("shape", "vocabulary"), SHAPES)
def test_fused_loss_in_bfloat16_is_close(shape, vocabulary, half_features):
    features, weight, targets = loss_case(shape, vocabulary)
    exact = loss_and_gradients(features, weight, targets, fused=False)
    features, weight = features.bfloat16() if half_features else features.float(), weight.float()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_and_gradients(features, weight, targets, fused=True)
    assert [value.dtype for value in half] == [torch.float32, features.dtype, torch.float32]
    bound = roundings(3, torch.bfloat16)  # two rounded factors and a rounded product
    assert half[0].item() == pytest.approx(exact[0].item(), rel=bound, abs=1e-6)
    for found, wanted in zip(half[1:], exact[1:], strict=True):
        assert (found.double() - wanted).norm() <= bound * wanted.norm() + 1e-6


def test_fused_loss_of_large_logits_is_finite():
    features, weight, targets = loss_case((300,), 37)
    case = (1e3 * features, weight, targets)
    made = loss_and_gradients(*case, fused=True)
    assert all(value.isfinite().all() for value in made)
    same(made, loss_and_gradients(*case, fused=False))


def test_of_nothing_scored_the_fused_loss_is_no_number_as_torchs():
    features, weight, targets = loss_case((5,), 31)
    nothing = torch.full_like(targets, -100)
    for fused in (True, False):
        assert loss_and_gradients(features, weight, nothing, fused=fused)[0].isnan()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.0), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("summed", [0, 1 << 22])
def test_exits_of_one_matrix(weights, summed, monkeypatch):
    """Kept as a sum or apart, of equal weight or not: the gradients of the plain loss."""
    monkeypatch.setattr(loss_module, "SUMMED_WEIGHTS", summed)
    features, weight, targets = loss_case((40,), 31)
    exits = [(scale * features).requires_grad_() for scale in (1.0, 0.5, 2.0)]
    weight.requires_grad_()
    plain = [F.cross_entropy(x @ weight.T, targets, ignore_index=-100) for x in exits]
    ours = exit_losses(exits, weight, targets)
    found, wanted = (
        torch.autograd.grad(sum(w * v for w, v in zip(weights, losses, strict=True)), inputs)
        for losses in (ours, plain)
        for inputs in ([*exits, weight],)
    )
    same((ours, found), (plain, wanted))
