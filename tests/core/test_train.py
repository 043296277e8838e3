"""Training that is killed, stopped, shared or broken."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import SAME, roundings, same
from safetensors.torch import load_file
from waiting import PATIENCE, wait_for

from crt_lib import CRT, InputError, load_corpus, load_profile, load_tokenizer, tokenize, train
from crt_lib.checkpoint import load_model, read_metrics, read_state, read_timing
from crt_lib.evaluate import evaluate
from crt_lib.files import locked
from crt_lib.train import TrainingError

ROOT = Path(__file__).parents[2]
SETTINGS = {"updates": 12, "grad_accum": 2, "checkpoint_every": 3, "eval_every": 4}
SETTINGS |= {"keep_every": 6, "eval_tokens": 256}


@cache
def data():
    corpus = load_corpus("grammar")
    return tokenize(corpus, load_tokenizer("word", corpus))


def settings(**changes):
    profile = load_profile("smoke")
    model = profile.model.replace(
        vocab_size=data().tokenizer.vocab_size, n_loops=3, exit_loops=(1, 2)
    )
    return model, profile.train.replace(**SETTINGS | changes)


def run(out, **changes):
    return train(*settings(**changes), data(), out, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    result = run(out)
    assert result.finished
    return out


def weights(out, name="last"):
    return load_file(out / "checkpoints" / f"{name}.safetensors")


def assert_same_run(one, other):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in ("last", "best", "update-000006", "update-000012"):
        ours, theirs = weights(one, name), weights(other, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_what_a_run_leaves(whole):
    rows = read_metrics(whole)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "valid_loss_2" in row]
    assert [row["update"] for row in training] == list(range(1, 13))
    assert [row["update"] for row in validation] == [4, 8, 12]
    assert training[-1]["tokens"] == 12 * 2 * 8 * 64
    drawn = {1 if "loss_1" in row else 2 for row in training}
    assert drawn == {1, 2}
    for row in training:
        one = row["loss_1"] if "loss_1" in row else row["loss_2"]
        total = 0.7 * row["loss_3"] + 0.3 * one  # of the means of two micro-batches, in float32
        assert row["loss"] == pytest.approx(total, rel=roundings(8))
    assert training[-1]["loss_3"] < training[0]["loss_3"]
    assert [row["update"] for row in read_timing(whole)] == list(range(1, 13))
    best = min(validation, key=lambda row: row["valid_loss_3"])
    assert read_state(whole / "checkpoints" / "best.safetensors")["update"] == best["update"]
    assert load_model(whole / "checkpoints" / "last.safetensors").config.n_loops == 3
    assert not list(whole.rglob("*.tmp"))


def test_without_a_limit_all_of_valid_chooses_the_best(tmp_path):
    result = run(tmp_path, eval_tokens=None, updates=1)
    (row,) = (row for row in result.metrics if "valid_loss_3" in row)
    whole = evaluate(result.model, data().valid, data().tokenizer.eot_id, seq_len=64)
    assert whole.words is not None and row["valid_loss_3"] == whole.loss[3]


def test_a_finished_run_is_not_trained_again(whole):
    before = {file: file.stat().st_mtime_ns for file in whole.glob("checkpoints/*")}
    assert run(whole).finished
    assert {file: file.stat().st_mtime_ns for file in whole.glob("checkpoints/*")} == before


# Kills its own process with SIGKILL at the n-th call of one function: before the call, or in the
# case of a checkpoint when half of its bytes are written.
KILLER = """
    import os, signal, sys
    import torch
    torch.set_num_threads({threads})
    import crt_lib.checkpoint, crt_lib.train
    from crt_lib.data import PackedWindows
    sys.path[:0] = {tests!r}
    import test_train
    from pathlib import Path

    def die_at(owner, name, nth, half_of_the_file=False):
        original, calls = getattr(owner, name), [0]
        def wrapper(*arguments, **keywords):
            calls[0] += 1
            if calls[0] == nth:
                if half_of_the_file:  # safetensors writes under another name, then renames
                    original(*arguments, **keywords)
                    path = Path(arguments[1])
                    os.truncate(path, path.stat().st_size // 2)
                    path.rename(path.parent / ".tmpAB12cd")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)
        setattr(owner, name, wrapper)

    die_at({owner}, {name!r}, {nth}, {half})
    test_train.run(Path(sys.argv[1]))
"""
MOMENTS = [
    ("PackedWindows", "batch", 4, False),  # in update 2: before any checkpoint
    ("crt_lib.checkpoint", "save_file", 3, True),  # while writing `best` or `last`
    ('sys.modules["crt_lib.train"]', "append_row", 5, False),  # between an update and its row
    ("os", "replace", 4, False),  # a whole file, not yet in its place
    ('sys.modules["crt_lib.train"]._Run', "_save", 3, False),  # what is kept is there, `last` not
    ("PackedWindows", "batch", 3, False),
]


def test_killed_at_any_moment_it_resumes_to_the_same_bits(whole, tmp_path):
    done = []
    for owner, name, nth, half in MOMENTS:
        moment = {"owner": owner, "name": name, "nth": nth, "half": half}
        threads = torch.get_num_threads()
        tests = [str(ROOT / "tests"), str(Path(__file__).parent)]
        code = KILLER.format(tests=tests, threads=threads, **moment)
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        process = subprocess.run(command, env=here(), capture_output=True, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        last = tmp_path / "checkpoints" / "last.safetensors"
        done.append(read_state(last)["update"] if last.exists() else 0)
    assert done[0] == 0 < done[-1] < SETTINGS["updates"], "the kills missed the run"
    assert run(tmp_path).finished
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.rglob("*.tmp*"))


def test_what_a_killed_write_left_goes_and_what_others_write_stays(tmp_path):
    run(tmp_path, updates=2)
    names = ["config.json", "timing.jsonl", "results.csv", "exits.csv", "checkpoints/best"]
    names += ["policies.csv"]
    left = [(tmp_path / name).parent / f".{Path(name).name}.ab12.tmp" for name in names]
    for file in left:
        file.write_bytes(b"half")
    run(tmp_path, updates=2)
    assert [file for file in left if file.exists()] == left[-1:]


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    out = tmp_path / "run"
    changes = ("updates=1000000", "eval_every=0", "checkpoint_every=100000")
    options = [word for change in changes for word in ("--set", f"train.{change}")]
    command = [sys.executable, "-m", "crt_lib.cli", "train", "--profile", "smoke", "--quiet"]
    command += ["--out", str(out), *options]
    process = subprocess.Popen(command, env=here(), stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    wait_for(lambda: process.poll() or (metrics.exists() and metrics.read_text().count("\n") > 2))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, stderr
    assert "the same command goes on" in stderr
    state = read_state(out / "checkpoints" / "last.safetensors")
    assert state["update"] == read_metrics(out)[-1]["update"] >= 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["train"]["status"] == "stopped"


def test_two_processes_match_one(tmp_path):
    """Twice the processes with half the accumulation each, through `accelerate launch` (gloo).

    In float64, and by AdamW: Muon turns its steps in float32.
    """
    program = tmp_path / "crt64.py"
    program.write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\n"
        "from crt_lib.cli import main\nmain()\n"
    )
    changes = ("updates=20", "grad_accum=2", "eval_every=0", "optimizer=adamw")
    options = ["--profile", "smoke", "--quiet", *(f"--set=train.{change}" for change in changes)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    alone = [*launch, str(program), "train", *options, "--out", str(tmp_path / "none")]
    process = subprocess.run(alone, env=here(), capture_output=True, text=True)
    assert process.returncode and "add --multi_gpu" in process.stderr
    launch.append("--multi_gpu")
    losses = {}
    for name, command in {"two": launch, "one": [sys.executable]}.items():
        command = [*command, str(program), "train", *options, "--out", str(tmp_path / name)]
        process = subprocess.run(command, env=here(), capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        part = json.loads((tmp_path / name / "manifest.json").read_text())["train"]
        assert part["status"] == "done" and part["processes"] == {"two": 2, "one": 1}[name]
        losses[name] = np.array([[v for k, v in row.items() if "loss" in k] for row in rows])
        assert losses[name].shape == (20, 3)  # all, one intermediate exit, the last
    same(losses["two"], losses["one"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(TrainingError, match="Lower max_lr"):
        run(tmp_path, max_lr=1e38, checkpoint_every=1)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        load_model(path)


def test_a_broken_loss_names_the_batch_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    model, config = settings(updates=8)
    forward, calls = CRT.forward, []

    def broken(self, *arguments, targets=None, **keywords):
        losses = forward(self, *arguments, targets=targets, **keywords)
        calls.append(self.training)
        if sum(calls) == 10:  # the second micro-batch of update 5
            losses[2] = losses[2] * float("nan")
        return losses

    monkeypatch.setattr(CRT, "forward", broken)
    with pytest.raises(TrainingError, match=r"micro-batch 2 of update 5 .*Lower max_lr"):
        train(model, config, data(), tmp_path, progress=False)
    assert read_state(tmp_path / "checkpoints" / "last.safetensors")["update"] == 3
    monkeypatch.undo()
    assert train(model, config, data(), tmp_path, progress=False).finished


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """In float64, and by AdamW: Muon turns its steps in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        plain, recomputed = (
            run(tmp_path / str(yes), optimizer="adamw", gradient_checkpointing=yes).metrics
            for yes in (False, True)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert ours == pytest.approx(theirs, **SAME)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_text_tokens_are_counted_without_padding(tmp_path, batching):
    result = run(tmp_path, batching=batching, updates=1, eval_every=0)
    tokens = result.metrics[0]["tokens"]
    assert (tokens == 2 * 8 * 64) if batching == "packed" else (0 < tokens < 2 * 8 * 63)


def test_bad_settings_write_nothing(tmp_path):
    model, config = settings()
    cases = [
        (model.replace(vocab_size=7), config, "the tokenizer's 46"),
        (model, config.replace(seq_len=4096), "longer than max_seq_len"),
        (model, config.replace(batch_size=100_000), "too few"),
    ]
    for model_config, train_config, message in cases:
        with pytest.raises(InputError, match=message):
            train(model_config, train_config, data(), tmp_path / "new", progress=False)
        assert not (tmp_path / "new").exists()


def test_what_another_run_has_written_or_writes_is_left(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"max_lr was 0.016, now 0.5.*--fresh"):
        run(whole, max_lr=0.5)
    with locked(whole / "run"), pytest.raises(InputError, match="another process is writing"):
        train(*settings(), data(), whole, resume=False, progress=False)
    assert before == {path: path.read_bytes() for path in before}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file" / "run")


def here():
    """The environment of a process with this package and as many threads."""
    threads = str(torch.get_num_threads())
    return os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
