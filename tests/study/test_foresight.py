"""Who knows more leaves better, and a rule that knows nothing is no better than a mix of exits."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from crt_lib.exits.trace import make_trace
from crt_lib.files import InputError
from crt_lib.study import foresight
from crt_lib.study.foresight import Seen, exits_at, gains, judge, of_mix


def seen_of(losses, apart=None):
    n, exits = losses.shape
    states, said = torch.zeros(n, exits - 1, 4).half(), torch.zeros(n, exits - 1, 3)
    document = np.arange(n) // 10
    return Seen(tuple(range(1, exits + 1)), losses, apart, states, said, document)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_knowing_the_losses_the_price_is_paid_best(seed, price):
    losses = np.random.default_rng(seed).gamma(1.0, 1.0, (50, 3))
    loops = (1, 2, 4)
    exit_of = exits_at(gains(losses), loops, price)
    paid = losses + price * np.array(loops)
    assert paid[np.arange(50), exit_of] == pytest.approx(paid.min(1))


@given(st.integers(0, 2**32 - 1), st.floats(1, 4))
def test_the_mix_is_the_lowest_line_between_two_exits(seed, mean):
    loops = np.array([1, 2, 4])
    losses = np.random.default_rng(seed).gamma(1.0, 1.0, (20, 3))
    drawn = of_mix(losses, loops, mean).mean()
    means = losses.mean(0)
    lines = [np.interp(mean, loops[[i, j]], means[[i, j]]) for i, j in ((0, 1), (1, 2), (0, 2))]
    inside = [line for line, ends in zip(lines, ((1, 2), (2, 4), (1, 4)), strict=True)
              if ends[0] <= mean <= ends[1]]  # fmt: skip
    assert drawn == pytest.approx(min(inside))


def test_noise_knows_nothing_and_the_losses_know_all():
    rng = np.random.default_rng(0)
    losses = rng.gamma(1.0, 1.0, (20_000, 2)) + np.array([0.1, 0.0])
    seen = seen_of(losses)
    blind = judge(seen, gains(rng.normal(size=losses.shape)), 2)
    told = judge(seen, gains(losses), 2)
    assert blind["low"] < 0.02 and blind["loops"] == 2
    assert told["low"] > 0.2 and 1 < told["loops"] < 1.3


def test_on_a_model_those_who_know_more_lose_less(scored, monkeypatch):
    monkeypatch.setattr(foresight, "EPOCHS", 2)
    model, data, _ = scored
    rows = foresight.foresight(model, data, 32, tokens=600)
    assert [row["who"] for row in rows[2:]] == list(foresight.NETWORKS)
    token, best, *networks = (row["knows"] for row in rows)
    assert token > best and token > max(networks)
    assert all(row["low"] <= row["knows"] <= row["high"] for row in rows)
    assert rows[0]["loops"] < rows[0]["fixed"] <= rows[0]["best"]


def test_losses_are_those_of_a_trace(scored):
    model, data, _ = scored
    loops = model.config.head_loops
    seen = foresight.see(model, data, "test", 32, loops[-1], 300)
    trace = make_trace(model, data, "test", 32, max_tokens=300)
    np.testing.assert_allclose(seen.losses, trace.loss, atol=1e-5)
    assert (seen.apart[:, -1] == 0).all() and (seen.document == trace.document).all()
    equal = copy.deepcopy(model).requires_grad_(False)
    for weight in equal.parameters():
        weight.zero_()
    with pytest.raises(InputError, match="too few documents"):
        foresight.foresight(model, data, 32, tokens=10)
    with pytest.raises(InputError, match="nothing to foresee"):
        foresight.foresight(equal, data, 32, tokens=64)
