"""`crt bench drafts`: shares are of what was verified, and the speed is the one the parts make."""

import numpy as np
import pytest

from crt_lib import InputError
from crt_lib.bench.drafts import _row, bench_drafts
from crt_lib.bench.ways import passages
from crt_lib.exits.speculate import Speculated


def test_shares_and_costs_are_those_of_the_verifications():
    verified = [(1, 1), (2, 1), (2, 2), (3, 0), (0, 0)]
    text = Speculated([0] * sum(kept + 1 for _, kept in verified), [], verified)
    seconds = np.array([0.010 + 0.002 * drafted for drafted, _ in verified[1:]])
    row = _row([(text, seconds)] * 10, np.full(10, 0.006))
    assert row["kept_1"] == 3 / 4 and row["kept_2"] == 1 / 2 and row["kept_3"] is None
    assert row["accepted"] == 4 / 8
    assert row["ms_verify"] == pytest.approx(10) and row["ms_draft"] == pytest.approx(2)
    new = 7  # of the last four verifications
    assert row["tokens"] == new / 4
    speed = 0.006 * new / seconds.sum()
    for name in ("predicted", "speedup", "low", "high"):
        assert row[name] == pytest.approx(speed), name
    assert "low" not in _row([(text, seconds)] * 9, np.full(9, 0.006))
    assert row["bound"] == pytest.approx(0.006 * 17 / (0.010 + 0.002 * 16))


def test_drafts_that_are_all_alike_have_no_slope():
    verified = [(1, 0), (2, 1), (2, 2), (2, 0), (1, 1)]
    text = Speculated([0] * sum(kept + 1 for _, kept in verified), [], verified)
    row = _row([(text, np.array([0.012, 0.014, 0.013, 0.009]))] * 2, np.full(2, 0.006))
    assert row["ms_draft"] is None and row["ms_verify"] == pytest.approx(13)
    assert row["bound"] == pytest.approx(0.006 * 3 / 0.013)


def test_every_loop_drafts_and_the_full_model_disposes(scored):
    model, data, _ = scored
    prompts = passages(data.test.ids, 10, 4)
    assert [len(prompt) for prompt in prompts] == [4] * 10
    rows = bench_drafts(model, prompts, 18)
    asked = [(row["temperature"], row["draft_loop"], row["last"]) for row in rows]
    exits, final = model.config.exit_loops, model.config.n_loops
    ways = [*((0, last) for last in (final, *exits)), *((loop, final) for loop in exits)]
    assert asked == [(t, *way) for t in (0.0, 1.0) for way in ways]
    for row in rows:
        assert 0 <= row["accepted"] <= 1 <= row["tokens"]
        assert 0 < row["low"] <= row["speedup"] <= row["high"]
    for few in (
        lambda: bench_drafts(model, prompts, 17),
        lambda: passages(data.test.ids, 10**6, 4),
    ):
        with pytest.raises(InputError):
            few()
