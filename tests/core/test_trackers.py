"""What a tracker is given is what metrics.jsonl holds, whatever the tracker."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from typing import ClassVar

import accelerate
import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker

from crt_lib import InputError, load_corpus, load_profile, load_tokenizer, tokenize, train
from crt_lib.checkpoint import read_metrics
from crt_lib.train import TrainingError


class Kept(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory = "kept", True
    said: ClassVar[list] = []

    def __init__(self, run_name, logging_dir, **how):
        super().__init__()
        self.said.append((run_name, str(logging_dir), how))

    @property
    def tracker(self):
        return self.said

    def store_init_configuration(self, values):
        self.said.append(values)

    def log(self, values, step=None, **how):
        self.said.append((step, values))

    def finish(self):
        self.said.append("finished")


@pytest.fixture
def smoke():
    """What `train` takes, for three updates and a validation."""
    corpus = load_corpus("grammar")
    data = tokenize(corpus, load_tokenizer("word", corpus))
    profile = load_profile("smoke")
    model = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    return model, profile.train.replace(updates=3, eval_every=0, eval_tokens=64), data


def test_a_tracker_has_every_row_once_and_ends(tmp_path, smoke, monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    there = [accelerate.utils.LoggerType.TENSORBOARD]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", there)
    monkeypatch.setattr(Kept, "said", [])
    train(*smoke, tmp_path, progress=False, log_with=["tensorboard"])
    begun, settings, *rows, end = Kept.said
    assert begun == ("crt", str(tmp_path / "logs"), {}) and end == "finished"
    assert settings["train.updates"] == "3"
    assert rows == [(row["update"], row) for row in read_metrics(tmp_path)]


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path, smoke):
    with pytest.raises(InputError, match="no tracker 'abacus' here; pip install"):
        train(*smoke, tmp_path / "run", progress=False, log_with=["abacus"])
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_one_line_and_the_run_goes_on_without(
    tmp_path, smoke, monkeypatch
):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    there = [accelerate.utils.LoggerType.TENSORBOARD]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", there)

    def fails(self):
        raise ValueError("not logged in")

    monkeypatch.setattr(Kept, "start", fails, raising=False)
    with pytest.raises(TrainingError, match="tensorboard: not logged in; leave it out"):
        train(*smoke, tmp_path, progress=False, log_with=["tensorboard"])
    assert train(*smoke, tmp_path, progress=False).finished


def test_tensorboard(tmp_path, smoke):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(*smoke, tmp_path, progress=False, log_with=["tensorboard"])
    kept = events.EventAccumulator(str(tmp_path / "logs" / "crt"))
    kept.Reload()
    shown = {
        name: [(e.step, e.value) for e in kept.Scalars(name)] for name in kept.Tags()["scalars"]
    }
    rows = read_metrics(tmp_path)
    assert len(rows) >= 3 and set(shown) == {name for row in rows for name in row}
    for name, points in shown.items():
        own = [(row["update"], row[name]) for row in rows if name in row]
        assert [step for step, _ in points] == [step for step, _ in own]
        assert [x for _, x in points] == pytest.approx([x for _, x in own], rel=1e-5)


def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    changes = ["--set", "train.updates=3", "--set", "train.eval_tokens=64"]
    words = ["train", "--profile", "smoke", "--out", str(tmp_path / "run"), *changes]
    subprocess.run(
        [sys.executable, "-m", "crt_lib.cli", *words, "--log-with", "trackio"],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "kept")},  # read where it is imported
        check=True,
    )
    database = contextlib.closing(sqlite3.connect(tmp_path / "kept" / "crt.db"))
    with database as kept:
        steps = [step for (step,) in kept.execute("SELECT step FROM metrics ORDER BY id")]
    assert steps == [row["update"] for row in read_metrics(tmp_path / "run")]


def test_weights_and_biases_without_a_network(tmp_path, smoke, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(*smoke, tmp_path, progress=False, log_with=["wandb"])
    assert any(path.stat().st_size for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
