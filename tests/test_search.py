"""`crt search`: equal tokens or equal time, several at once, and none is trained twice."""

import pytest

from crt_lib import InputError, load_profile
from crt_lib.search import exit_losses, grid, search, summarise

SMOKE = load_profile("smoke").replace(train=load_profile("smoke").train.replace(updates=3))


def test_rows_by_arm_rate_and_seed_and_none_twice(tmp_path):
    out, lines = tmp_path / "search.csv", []
    trials = grid({"crt2": SMOKE}, rates=(1e-2, 1e-12), seeds=(0, 1))
    rows = search(trials[:3], out, jobs=2, echo=lines.append)
    assert {(row["max_lr"], row["seed"]) for row in rows} == {(1e-2, 0), (1e-12, 0), (1e-2, 1)}
    assert all(row["tokens"] == 3 * 512 and row["budget"] == "3 updates" for row in rows)
    (best,) = summarise(rows, ["crt2", "absent"], "3 updates")
    assert (best["max_lr"], best["seeds"], best["rates"], best["edge"]) == (1e-2, 2, 2, True)
    assert best["exit_losses"][4] == pytest.approx(exit_losses(rows[0])[4])
    assert {row["threads"] for row in rows} == {1}

    before = out.read_text().splitlines()
    rows = search(trials, out, echo=lines.append)
    assert len(rows) == 4 and len(lines) == 4
    assert set(before) < set(out.read_text().splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["search.csv"]


def test_two_searches_of_the_same_trial_agree(tmp_path):
    first, second = (
        search(grid({"a": SMOKE}), tmp_path / name, threads=1, echo=str)[0] for name in "ab"
    )
    assert first["exit_losses"] == second["exit_losses"]


def test_minutes_set_the_updates_from_the_pace(tmp_path):
    wide = SMOKE.replace(model=SMOKE.model.replace(d_model=128))
    arms = {"small": SMOKE, "wide": wide}
    rows = search(grid(arms), tmp_path / "s.csv", minutes=0.03, threads=1, echo=str)
    updates = {row["arm"]: row["updates"] for row in rows}
    assert updates["small"] > updates["wide"] >= 1
    assert {row["budget"] for row in rows} == {"0.03 min"}


@pytest.mark.parametrize("bad", [{"minutes": 0}, {"minutes": -1}, {"jobs": 0}])
def test_bad_input(tmp_path, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        search([], tmp_path / "s.csv", **bad)
