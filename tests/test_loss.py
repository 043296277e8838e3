"""The chunked losses against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from crt_lib import loss as loss_module
from crt_lib.loss import linear_cross_entropy
from crt_lib.model import total_loss


@pytest.fixture(params=["fused", "whole", "torch", "checkpointed"])
def path(request, monkeypatch):
    """Each way the loss can be computed; seven rows of logits at once where it is chunked."""
    if request.param == "torch" and not loss_module._TORCH_CHUNKS:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(loss_module, "_TORCH_CHUNKS", request.param == "torch")
    monkeypatch.setattr(loss_module, "FUSED_ROWS", 7)
    if request.param != "fused":
        monkeypatch.setattr(loss_module, "FUSED_WEIGHTS", 0)
    if request.param in ("torch", "checkpointed"):
        monkeypatch.setattr(loss_module, "WHOLE_ELEMENTS", 0)
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 7 * 31)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_cross_entropy_of_full_logits(path, reduction):
    torch.manual_seed(0)
    features = torch.randn(3, 11, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(31, (3, 11))
    targets[0, :4] = -100
    scale = torch.randn(3, 11) if reduction == "none" else torch.tensor(0.7)

    ours = linear_cross_entropy(features, weight, targets, reduction)
    grads = torch.autograd.grad((ours * scale).sum(), (features, weight))
    logits = F.linear(features, weight).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
    plain = plain.view(ours.shape)
    expected = torch.autograd.grad((plain * scale).sum(), (features, weight))

    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_half_precision_autocast_is_close(path):
    torch.manual_seed(0)
    features, weight = (torch.randn(n, 8, requires_grad=True) for n in (40, 31))
    targets = torch.randint(31, (40,))
    plain = F.cross_entropy(features @ weight.T, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_cross_entropy(features.bfloat16(), weight, targets)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(plain.item(), rel=0.02)


def test_total_loss_is_equation_5():
    losses = {
        2: torch.tensor(4.0),
        4: torch.tensor(3.0),
        6: torch.tensor(2.0),
        8: torch.tensor(1.0),
    }
    assert total_loss(losses, 0.3).item() == pytest.approx(0.7 * 1.0 + 0.3 * 3.0)
    assert total_loss({8: torch.tensor(1.5)}, 0.3).item() == 1.5
