"""The learning rate against torch's scheduler, and the seeds of an update."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from crt_lib.config import TrainConfig
from crt_lib.data import updates_planned
from crt_lib.optim import learning_rate, random_seed


@settings(max_examples=40)
@given(updates=st.integers(2, 100), warmup=st.sampled_from([0.05, 0.1, 0.31]))
def test_is_one_cycle(updates, warmup):
    if abs(warmup * updates - 1) < 1e-9:
        return  # where torch divides by zero
    config = TrainConfig(max_lr=0.7, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = OneCycleLR(
        optimizer, 0.7, total_steps=updates, pct_start=warmup, cycle_momentum=False
    )
    for update in range(updates):
        torch_lr = optimizer.param_groups[0]["lr"]
        if warmup * updates > 1:
            assert learning_rate(update, updates, config) == pytest.approx(torch_lr, rel=1e-6)
        optimizer.step()
        scheduler.step() if update < updates - 1 else None


@given(updates=st.integers(1, 50), warmup=st.floats(0, 0.9))
def test_is_defined_and_bounded_everywhere(updates, warmup):
    config = TrainConfig(max_lr=0.7, warmup=warmup)
    rates = [learning_rate(update, updates, config) for update in range(updates)]
    assert all(0 < rate <= 0.7 for rate in rates)
    assert updates < 3 or rates[-1] == pytest.approx(0.7 / 250_000)


@given(st.sets(st.tuples(*[st.integers(0, 1000)] * 3), min_size=2))
def test_seeds_are_distinct(triples):
    assert len({random_seed(*triple) for triple in triples}) == len(triples)


def test_updates_from_epochs():
    config = TrainConfig(epochs=2.5, grad_accum=4)
    assert updates_planned(config, 100) == 62
    assert updates_planned(config.replace(updates=7), 100) == 7
    assert updates_planned(config.replace(epochs=0.001), 100) == 1
