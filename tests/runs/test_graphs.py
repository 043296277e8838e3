"""Losses from graphs are the model's own; a choice of exits is captured once, and draws nothing."""

import pytest
import torch

from crt_lib.config import TrainConfig
from crt_lib.device import Precision
from crt_lib.loss import total_loss
from crt_lib.model import CRT
from crt_lib.runs.graphs import GraphedLosses, graphs_fit
from crt_lib.runs.profiles import load_profile


@pytest.fixture
def captured(monkeypatch):
    """The exits that were captured; capturing runs a pass, as CUDA's does, and keeps the module."""
    seen = []

    def capture(module, given, allow_unused_input):
        assert not torch.is_autocast_cache_enabled() or not torch.is_autocast_enabled("cuda")
        module(*given)
        torch.rand(7)
        seen.append(module.exits)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return seen


def test_graphed_losses_and_gradients_are_the_models(captured):
    torch.manual_seed(0)
    model = CRT(load_profile("smoke").model.replace(vocab_size=50))
    ids, targets = torch.randint(50, (2, 2, 12))
    losses, last = GraphedLosses(model, Precision("fp32", "")), model.config.n_loops
    exits = model.config.head_loops
    for chosen in (exits, (last,), exits):
        torch.manual_seed(1)
        graphed = losses(ids, chosen, targets)
        after = torch.rand(1)
        torch.manual_seed(1)
        plain = model(ids, chosen, targets=targets)
        assert torch.equal(after, torch.rand(1))  # a resumed run captures at another update
        assert list(graphed) == list(plain) == list(chosen)
        for of in (graphed, plain):
            model.zero_grad()
            total_loss(of, 0.3).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            of["gradients"] = gradients
        for a, b in zip(graphed.pop("gradients"), plain.pop("gradients"), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(graphed[loop], plain[loop]) for loop in chosen)
    assert captured == [exits, (last,)]


def test_graphs_serve_one_micro_batch_an_update_on_a_gpu(monkeypatch):
    config = TrainConfig(grad_accum=1)
    assert not graphs_fit(config) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert graphs_fit(config)
    for other in ({"grad_accum": 2}, {"compile": True}, {"gradient_checkpointing": True}):
        assert not graphs_fit(config.replace(**other))
