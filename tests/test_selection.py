"""`crt select`: candidates share a time, and none is trained twice."""

import pytest

from crt_lib import InputError, load_profile
from crt_lib.selection import best, select


def test_candidates_are_compared_and_not_repeated(tmp_path):
    smoke = load_profile("smoke")
    candidates = {
        "good": smoke,
        "frozen": smoke.replace(train=smoke.train.replace(max_lr=1e-12)),
    }
    out, lines = tmp_path / "choice.csv", []
    rows = select(candidates, 0.02, out, lines.append)
    assert [row["candidate"] for row in rows] == ["good", "frozen"]
    assert all(row["updates"] >= 1 and row["tokens"] == row["updates"] * 512 for row in rows)
    assert best(rows)["candidate"] == "good"

    table = out.read_bytes()
    select(candidates, 0.02, out, lines.append)
    assert out.read_bytes() == table and "already in" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["choice.csv"]


def test_no_time_is_an_error(tmp_path):
    with pytest.raises(InputError, match="minutes is 0"):
        select({}, 0, tmp_path / "choice.csv")
