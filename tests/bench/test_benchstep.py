"""The paths of a step that are compared compute the same, and the table has each."""

import pytest
import torch

from crt_lib import load_profile
from crt_lib.bench.step import PATHS, bench_step, step_costs

SMOKE = load_profile("smoke")


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the paths of a CPU")
def test_a_row_a_path(monkeypatch):
    monkeypatch.delitem(PATHS, "fused loss, one exit, compiled")
    rows = bench_step(SMOKE, steps=2)
    assert [row["path"] for row in rows] == list(PATHS)
    assert rows[0]["speedup"] == 1 and all(row["tokens_per_second"] > 0 for row in rows)


def test_costs_are_shares_of_a_whole_in_falling_order():
    costs = step_costs(SMOKE)
    shares = [row["share"] for row in costs]
    assert len(costs) == 5 and shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
