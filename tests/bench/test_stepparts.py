"""The time of a step by part: it sums to the step's, and timing changes nothing."""

import contextlib
import time

import pytest
import torch
from closeness import same
from tiny_models import TINY, VARIANTS

from crt_lib import kernels
from crt_lib.audit.accounting import cycle_multiply_adds, multiply_adds, parameters_by_part
from crt_lib.bench.parts import OTHER, PARTS, RECOMPUTED, Clock, part_bounds
from crt_lib.bench.training import part_rows
from crt_lib.bench.trial import Trial
from crt_lib.loss import total_loss
from crt_lib.model import CRT


def gradients(config, checkpointing, watched):
    torch.manual_seed(0)
    model = CRT(config).double().train()
    model.gradient_checkpointing = checkpointing
    ids = torch.randint(config.vocab_size, (2, 17))
    clock = Clock("cpu")
    torch.manual_seed(1)
    with clock.watch(model) if watched else contextlib.nullcontext():
        loss = total_loss(model(ids[:, :-1], targets=ids[:, 1:]), 0.3)
        loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}, clock


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trm", VARIANTS)
def test_gradients_are_those_of_an_unwatched_step(trm, checkpointing):
    config = TINY.replace(trm=trm, dropout=0.2)
    plain, _ = gradients(config, checkpointing, False)
    watched, clock = gradients(config, checkpointing, True)
    same(watched, plain)
    assert (clock.seconds[RECOMPUTED] > 0) == checkpointing
    assert set(clock.seconds) <= set(PARTS) and clock.seconds["heads"] > 0


def test_the_parts_sum_to_the_step_and_nothing_stays_behind():
    frozen = kernels.frozen_running_statistics
    began = time.perf_counter()
    _, clock = gradients(TINY, True, True)
    assert 0 < sum(clock.seconds.values()) <= time.perf_counter() - began
    assert kernels.frozen_running_statistics is frozen
    model = CRT(TINY)
    with clock.watch(model):
        pass
    assert not model.embed._forward_hooks and not model.block.attention._forward_pre_hooks


@pytest.mark.parametrize("part, module", [("attention", "attention"), ("MLP", "down")])
def test_a_slow_part_is_charged(part, module, monkeypatch):
    """A pause in a module's forward pass, or in its backward pass, is the part's time."""
    for backward in (False, True):
        torch.manual_seed(0)
        model = CRT(TINY).train()
        slow = (
            model.block.attention.out if module == "attention" else model.block.trm.cycles[0].down
        )
        if backward:
            slow.register_full_backward_hook(lambda *_: time.sleep(0.05))
        else:
            slow.register_forward_hook(lambda *_: time.sleep(0.05))
        clock, ids = Clock("cpu"), torch.randint(TINY.vocab_size, (2, 17))
        with clock.watch(model):
            loss = total_loss(model(ids[:, :-1], targets=ids[:, 1:]), 0.3)
            loss.backward()
        assert clock.seconds[part] > 0.05 * TINY.n_loops


@pytest.mark.parametrize("changes", [{}, {"n_prelude": 1}, {"pointwise": False}, {"trm": "conv"}])
def test_bounds_count_every_multiply_add_once(changes):
    """With a memory without limits, the bounds are the step's multiply-adds but for the taps."""
    config = TINY.replace(**changes)
    bounds = part_bounds(config, 3, 10, peak=1.0, bandwidth=float("inf"))
    counts = sum(multiply_adds(config, 10).values())
    cycles = (config.n_prelude + config.n_loops) * config.n_cycles
    counts -= cycles * cycle_multiply_adds(config)["depthwise"]
    assert sum(bounds.values()) == pytest.approx(6 * 30 * counts)
    moved = part_bounds(config, 3, 10, peak=float("inf"), bandwidth=1.0)
    assert moved["optimiser"] == 40 * sum(parameters_by_part(config).values())
    taps = 20 * 30 * config.d_model * cycles if config.trm != "conv" else 0
    assert moved["convolution"] == taps


def test_rows_of_parts_are_shares():
    steps = [{"MLP": 3.0, OTHER: 1.0}, {"MLP": 5.0, OTHER: 1.0}, {"MLP": 3.0, OTHER: 2.0}]
    rows = {row["part"]: row for row in part_rows(Trial(steps, {}), {"MLP": 1.5})}
    assert list(rows) == list(PARTS)
    assert rows["MLP"]["seconds"] == 3 and rows["MLP"]["share"] == 0.75
    assert rows["MLP"]["of_bound"] == 0.5 and rows[OTHER]["of_bound"] is None
    assert rows["MLP"]["share_of_lost"] == pytest.approx(0.6)
