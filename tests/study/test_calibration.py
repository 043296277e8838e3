"""A calibrated way keeps its promise on documents that chose nothing."""

import dataclasses

import numpy as np
import pytest

from crt_lib.exits.trace import make_trace
from crt_lib.study.calibration import calibrate_exits, hold_to
from crt_lib.study.policies import taken_losses


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.5])
def test_what_is_kept_loses_at_most_the_budget_where_it_chose_nothing(scored, budget):
    model, data, valid = scored
    test = make_trace(model, data, "test", valid.seq_len)
    choices = calibrate_exits(model, data, valid, test, budget, groups=2)
    assert choices.budget == budget
    assert next(iter(choices.ways)) == "full" and choices.ways["full"].above == 0
    drafts = {way.draft_loop for way in choices.ways.values()} - {None}
    assert drafts == {0, *model.config.exit_loops}
    by_text = {way.policy.fixed for way in choices.ways.values() if way.draft_loop == 0}
    assert by_text == {None, *(int(name) for name in choices.ways if name.isdecimal())}
    half = valid.document >= (valid.document[-1] + 1) // 2
    for name, way in choices.ways.items():
        assert way.speedup > 0
        lost = taken_losses(model, data, valid, way.policy) - valid.loss[:, -1]
        lost = (lost[half] if way.policy.asks else lost).mean()
        assert way.above == pytest.approx(lost, abs=1e-6), name
        assert way.above <= way.high <= np.log1p(budget) or name == "full"
        if way.paid is not None:
            paid = (taken_losses(model, data, test, way.policy) - test.loss[:, -1]).mean()
            assert way.paid_low <= way.paid <= way.paid_high
            assert way.paid == pytest.approx(paid, abs=1e-6)
    for name, way in choices.failed.items():
        assert name not in choices.ways and way.high > np.log1p(budget)
    assert choices.failed or budget
    for row in hold_to(choices, model, data, test):
        way = (choices.ways if row["kept"] else choices.failed)[row["policy"]]
        assert (row["above"], row["low"], row["high"]) == (way.paid, way.paid_low, way.paid_high)
    if budget == 0.5:
        assert set(map(str, model.config.exit_loops)) <= set(choices.ways)


def test_thresholds_come_from_the_first_half_alone(scored):
    model, data, valid = scored
    middle = int(np.searchsorted(valid.document, (valid.document[-1] + 1) // 2))
    scores = {name: own.copy() for name, own in valid.scores.items()}
    for own in scores.values():
        own[middle:] = 0.123
    other = dataclasses.replace(valid, scores=scores)
    one, two = (calibrate_exits(model, data, v, valid, 0.5, groups=2) for v in (valid, other))
    assert {n: w.policy for n, w in one.ways.items()} == {n: w.policy for n, w in two.ways.items()}
