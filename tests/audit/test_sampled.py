"""The two-sample test of random models: its false alarms and its power are what it says."""

import numpy as np
import torch
import torch.nn.functional as F

from crt_lib import causality_report
from crt_lib.audit import sampled
from crt_lib.audit.asking import Asked

V = 7
NOISES = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "skewed": lambda g, shape: g.exponential(size=shape),
    "without a mean": lambda g, shape: g.standard_cauchy(shape),
    "rare": lambda g, shape: 3.0 * (g.random(shape) < 0.05),
    "one number a call": lambda g, shape: np.broadcast_to(g.standard_normal(), shape).copy(),
}


def noisy(seed, noise, size=0.1, leak=0.0):
    """A sound model, and `leak` of the next token, with numbers of its own."""
    g = np.random.default_rng(seed)
    table = torch.from_numpy(g.standard_normal((V, V))).float()

    def model(ids):
        ahead = F.pad(F.one_hot(ids, V)[:, 1:], (0, 0, 0, 1))
        drawn = torch.from_numpy(noise(g, (*ids.shape, V))).float()
        return table[ids].cumsum(1) + leak * ahead + size * drawn

    return model


def test_alarms_on_200_sound_models():
    alarms = 0
    for seed in range(200):
        noise = list(NOISES.values())[seed % len(NOISES)]
        report = causality_report(noisy(seed, noise), V, length=6, context=12, seed=seed)
        assert report.random == "own"
        alarms += report.leaks
    # 1% of 200 are 2; a binomial of that rate is above 6 once in 200 times
    assert alarms <= 6


def test_its_power_is_what_it_says():
    def found(leak, noise=0.01):
        ids = torch.arange(6)[None]
        asked = Asked(noisy(0, NOISES["normal"], noise, leak), ids, V, random="own")
        (case,) = [c for c in sampled.cases(asked) if c.probe == "tokens" and c.watched == 5]
        columns, power = [], None
        for number in range(60):
            column, power = sampled._compare(asked, case, 32, 0.01 / 6, number)
            columns.append(bool((column[0] > power.critical).any()))
        return sum(columns) / len(columns), power

    share, power = found(0.0)
    assert share <= 0.05 and 0.005 < power.noise < 0.02
    share, _ = found(power.smallest)
    assert share >= 0.75  # 0.9 and more: two logits move, the shift of one is stated
    share, _ = found(power.smallest / 3)
    assert share <= power.of(power.smallest / 3) * 2 + 0.15
    assert power.of(power.smallest) > 0.89 and power.of(sampled.EFFECT) < 0.05
    assert "found with" in str(power)


def test_what_a_random_model_cannot_be_asked_is_said():
    model = noisy(0, NOISES["normal"], leak=1.0)

    def of_six(ids):
        assert ids.shape == (1, 6), "one row of six"
        return model(ids)

    report = causality_report(of_six, V, length=6)
    assert report.convicting == ["tokens"] and report.power is not None
    assert all("one row of six" in report.left_out[x] for x in ("rows", "prefix", "count"))


def test_rounding_is_no_effect():
    """A part that rounds by what comes later, beside noise, is not convicted."""

    def model(ids):
        own = F.one_hot(ids, V).float()
        rounding = 1e-7 * ids.sum(1)[:, None, None]
        g.standard_normal()
        noise = torch.zeros_like(own)
        noise[..., 0] = float(g.standard_normal())
        return own + rounding + noise

    g = np.random.default_rng(0)
    assert not causality_report(model, V, length=6, context=12).leaks


def test_rare_noise_is_no_leak():
    """Noise that the first calls do not show: a conviction that does not come again is none."""
    for seed in range(12):
        g = np.random.default_rng(seed)

        def model(ids, g=g):
            return F.one_hot(ids, V).float() + float(g.random() < 0.02) * float(g.random())

        assert not causality_report(model, V, length=6, context=12).leaks
