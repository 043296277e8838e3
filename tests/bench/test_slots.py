"""Ticks are counted as rows run them, and a batch over depth is never below its own bounds."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from crt_lib.bench.slots import bench_slots, measure_costs, simulate
from crt_lib.exits.policy import Policy

FREE = np.repeat([[0.0], [1.0], [0.0]], 10, 1)  # a tick costs 1, whoever is at work


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12))
def test_equal_depth_costs_its_loops_however_rows_wait(rows, depth, length):
    loops = np.full((rows, length), depth)
    for together in range(1, rows + 1):
        found = simulate(loops, FREE, together)
        assert found.seconds == pytest.approx(depth / rows)
        assert found.ticks == depth and found.occupancy == 1


@given(st.integers(2, 8), st.integers(2, 30), st.integers(0, 99))
def test_rows_that_do_not_wait_run_their_own_loops(rows, length, seed):
    loops = np.random.default_rng(seed).integers(1, 5, (rows, length))
    apart, together = (simulate(loops, FREE, count) for count in (1, rows))
    assert apart.occupancy == 1
    # with all rows together a token takes the deepest row's loops
    assert together.ticks == pytest.approx(loops.max(0).mean())
    assert together.occupancy == pytest.approx(loops.mean() / loops.max(0).mean())
    assert apart.seconds <= together.seconds * (1 + 4 / length)  # but for the last token in hand


def test_heads_and_embeddings_are_paid_as_often_as_they_are_run():
    loops = np.array([[1, 1, 1, 1], [2, 2, 2, 2]])
    costs = np.array([[0.0, 10.0, 10.0], [0.0, 0.0, 0.0], [0.0, 100.0, 100.0]])
    whole = simulate(loops, costs, 2)
    assert whole.seconds * 8 == 4 * 10 + 4 * 100
    alone = simulate(loops, costs, 1)  # ticks: 1 reads row 0, 2 both, 3 row 0, 4 both and ends
    assert alone.seconds * 6 == 10 + (100 + 10) * 3 + 100


def test_rows_of_a_trace(scored):
    model, _, valid = scored
    costs = measure_costs(model, 4, length=8)
    assert costs.shape == (3, 5) and (costs[:, 1:] > 0).all() and not costs[:, 0].any()
    np.testing.assert_allclose(costs[:, 3], costs[:, [2, 4]].mean(1))
    policies = {"full depth": Policy(), "exit 1": Policy(fixed=1)}
    policies["similarity"] = Policy("similarity", 0.9, 0.9, 1.0)
    table = {(row["policy"], row["way"]): row for row in bench_slots(model, valid, policies, 4)}
    fixed = {("full depth", ""), ("exit 1", "")}
    assert set(table) == {*fixed, ("similarity", "waiting"), ("similarity", "slots")}
    assert table["full depth", ""]["above"] == 0
    assert table["exit 1", ""]["ticks"] == 1
    assert table["exit 1", ""]["speedup"] > 1
    slots, waiting = (table["similarity", way] for way in ("slots", "waiting"))
    assert slots["speedup"] >= waiting["speedup"]
