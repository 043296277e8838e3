"""`crt search`: equal tokens or equal time, several at once, and none is trained twice."""

import io
import math
import sys

import psutil
import pytest
import torch
from waiting import PATIENCE, wait_for

from crt_lib import InputError, load_profile, train
from crt_lib.files import read_rows
from crt_lib.study.search import documents_file, exit_losses, grid, search, summarise, tune
from crt_lib.study.trial import TIMED, WARM_UP, run_trial

SMOKE = load_profile("smoke")


def test_rows_by_arm_rate_and_seed_and_none_twice(tmp_path):
    out, lines = tmp_path / "search.csv", []
    trials = grid({"crt2": SMOKE}, (1e-2, 1e-12), (0, 1), updates=3)
    rows = search(trials[:3], out, jobs=2, echo=lines.append)
    assert {(row["max_lr"], row["seed"]) for row in rows} == {(1e-2, 0), (1e-12, 0), (1e-2, 1)}
    assert all(row["tokens"] == 3 * 512 and row["budget"] == "3 updates" for row in rows)
    (best,) = summarise(rows, ["crt2", "absent"], "3 updates")
    assert (best["max_lr"], best["seeds"], best["rates"], best["edge"]) == (1e-2, 2, 2, True)
    assert best["low"] <= best["loss"] <= best["high"]
    assert {row["threads"] for row in rows} == {1}

    before = out.read_text().splitlines()
    rows = search(trials, out, echo=lines.append)
    assert len(rows) == 4 and len(lines) == 4
    assert set(before) < set(out.read_text().splitlines())
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["search.csv"]


def test_a_terminal_sees_how_many_have_ended(tmp_path, here, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    search(grid({"a": SMOKE}, (1e-2, 1e-3), updates=1), tmp_path / "s.csv", threads=1, echo=str)
    assert "0/2 [" in sys.stderr.getvalue() and "1/2 [" in sys.stderr.getvalue()


def test_a_changed_arm_is_trained_again_and_the_same_is_the_same(tmp_path, here):
    deeper = SMOKE.replace(model=SMOKE.model.replace(n_loops=5))
    (row,), (changed,), (again,) = (
        search(grid({"a": profile}, (1e-2,), updates=2), tmp_path / name, threads=1, echo=str)
        for name, profile in (("s.csv", SMOKE), ("s.csv", deeper), ("t.csv", SMOKE))
    )
    assert changed["settings"] != row["settings"]
    assert changed["parameters"] > row["parameters"]
    assert again["exit_losses"] == row["exit_losses"]
    assert set(exit_losses(row)) == {1, 2, 3, 4}


def test_a_killed_search_leaves_no_worker_behind(tmp_path):
    code = (
        "import sys; from crt_lib import load_profile; "
        "from crt_lib.study.search import grid, search; "
        "search(grid({'a': load_profile('smoke')}, (1e-2,), updates=10**6), sys.argv[1])"
    )
    parent = psutil.Popen([sys.executable, "-c", code, tmp_path / "search.csv"])
    workers = []

    def at_work():
        """Whether there is a worker past its imports."""
        found = parent.children(recursive=True)
        workers[:] = [child for child in found if child.cpu_times().user > 1]
        return workers

    wait_for(at_work)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []


@pytest.mark.parametrize("start", [0.25, 4.0])
def test_tune_walks_until_the_best_rate_has_worse_ones_around(tmp_path, monkeypatch, start):
    made = []

    def fake(trials, out, **how):
        made.extend(trials)
        return [
            t.key | {"valid_loss": abs(t.profile.train.max_lr - (2 if t.arm == "a" else 0.5))}
            for t in made
        ]

    monkeypatch.setattr("crt_lib.study.search.search", fake)
    tune({"a": SMOKE, "b": SMOKE}, tmp_path / "s.csv", [start], (3, 5), updates=2)
    tried = {
        arm: [(t.profile.train.max_lr, t.profile.train.seed) for t in made if t.arm == arm]
        for arm in "ab"
    }
    between = {rate for rate, _ in tried["a"]}
    assert {1.0, 2.0, 4.0} <= between and len(tried["a"]) == len(set(tried["a"]))
    assert {0.25, 0.5, 1.0} <= {rate for rate, _ in tried["b"]}
    assert [pair for pair in tried["a"] if pair[1] == 5] == [(2.0, 5)]
    assert [pair for pair in tried["b"] if pair[1] == 5] == [(0.5, 5)]


@pytest.mark.parametrize(("pace", "expected"), [(0.5, 120), (7.0, 9), (100.0, 1)])
def test_minutes_set_the_updates_from_the_pace(monkeypatch, pace, expected):
    """On a clock that a training moves on: 30 seconds once a process, 2 a run, `pace` an update."""
    clock, runs = [0.0], []

    def trained(model, config, *rest, **how):
        clock[0] += (0 if runs else 30) + 2 + pace * config.updates
        runs.append(config.updates)
        return train(model, config.replace(updates=1), *rest, **how)

    monkeypatch.setattr("crt_lib.study.trial.train", trained)
    monkeypatch.setattr("time.process_time", lambda: clock[0])
    (trial,) = grid({"a": SMOKE}, (1e-3,), minutes=1)
    row, _ = run_trial(trial, torch.get_num_threads(), documents=False)
    assert runs == [1, WARM_UP, WARM_UP + TIMED, row["updates"]]
    assert row["updates"] == expected and row["cpu_seconds"] == 2 + pace * expected


def test_a_trial_of_minutes_has_one_thread(tmp_path, here):
    (row,) = search(grid({"a": SMOKE}, (1e-3,), minutes=1e-6), tmp_path / "s.csv", echo=str)
    assert (row["budget"], row["threads"], row["updates"]) == ("1e-06 min", 1, 1)


def test_a_broken_training_is_a_row_and_the_others_go_on(tmp_path, here):
    rows = search(grid({"a": SMOKE}, (1e38, 1e-3), updates=2), tmp_path / "s.csv", echo=str)
    losses = {row["max_lr"]: row["valid_loss"] for row in rows}
    assert losses[1e38] == math.inf and losses[1e-3] < 10
    assert summarise(rows, ["a"], "2 updates")[0]["max_lr"] == 1e-3
    assert exit_losses(next(row for row in rows if row["max_lr"] == 1e38)) == {}


def test_a_model_that_sees_the_future_has_its_deployable_loss(tmp_path, here):
    released = load_profile("smoke", "released")
    (row,) = search(grid({"r": released}, (1e-2,), updates=40), tmp_path / "s.csv", echo=str)
    assert row["valid_loss"] > exit_losses(row)[4] + 0.1


def test_documents_are_added_to_a_trial_that_has_none(tmp_path, here):
    text = "one two three\n\nfour five six\n\n" * 300
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(text)
    profile = SMOKE.replace(corpus=str(tmp_path), tokenizer="bpe:260")
    trials, out = grid({"a": profile}, (1e-2,), updates=2), tmp_path / "s.csv"
    search(trials, out, echo=str)
    assert not documents_file(out).exists()
    search(trials, out, documents=True, echo=str)
    assert len(read_rows(out)) == 1 and len(read_rows(documents_file(out))) == 600

    with pytest.raises(InputError, match="does not keep the text's bytes"):
        search(grid({"a": SMOKE}, (1e-2,), updates=2), tmp_path / "t.csv", documents=True)


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": -1}, "minutes is -1"),
        ({"minutes": float("inf")}, "minutes is inf"),
        ({"minutes": 1, "updates": 2}, "not both"),
        ({"rates": ()}, "no learning rate"),
    ],
)
def test_bad_input(bad, match):
    with pytest.raises(InputError, match=match):
        grid({"a": SMOKE}, **{"rates": (1e-3,)} | bad)


def test_no_jobs_is_an_error(tmp_path):
    with pytest.raises(InputError, match="jobs is 0"):
        search([], tmp_path / "s.csv", jobs=0)


def test_a_table_that_cannot_be_written_is_refused_before_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr("crt_lib.study.search.run_trial", None)
    trials = grid({"a": SMOKE}, (1e-2,))
    with pytest.raises(InputError, match="is a folder"):
        search(trials, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        search(trials, tmp_path / "file" / "s.csv")
