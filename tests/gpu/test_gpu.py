"""`crt gpu`: a rehearsal killed and called again on a bare machine; parts that fail; bad input."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_parts import crashes, hangs, late, raises, works
from waiting import PATIENCE, wait_for

from crt_lib import InputError, cli
from crt_lib.audit.accounting import parameters_by_part
from crt_lib.bench.gpt2 import cost_of_a_token
from crt_lib.bench.table import put_rows, rows_of
from crt_lib.cached.step import Step
from crt_lib.files import read_rows
from crt_lib.gpu import checks as gpuchecks, training as gputraining
from crt_lib.gpu.parts import Job, run_parts
from crt_lib.gpu.run import PARTS, run_gpu
from crt_lib.gpu.training import arms
from crt_lib.model import CRT

ROOT = Path(__file__).parents[2]
CHECKS = runpy.run_path(str(ROOT / gpuchecks.CHECKS))["CHECKS"]
BARE = """
import sys
for name in ("typer", "pandas", "matplotlib", "seaborn", "pytest", "hypothesis", "datasets",
             "papermill", "ipywidgets", "lm_eval", "tensorboard"):
    sys.modules[name] = None  # importing it raises ImportError
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A rehearsal's folder: killed while it trains, then called again; the manifests of both."""
    bare, out = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("gpu") / "out"
    (bare / "sitecustomize.py").write_text(BARE)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(bare), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "crt_lib.gpu", "--rehearse", "--out", str(out)]
    command += ["--minutes", "40"]  # no share of them ends before its part, whatever else runs here
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, env=environment, cwd=bare, **pipes)
    timing = out / "training" / "crt2" / "timing.jsonl"
    checkpoint = out / "training" / "crt2" / "checkpoints" / "last.safetensors"
    wait_for(lambda: checkpoint.exists() or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    said, _ = first.communicate(timeout=PATIENCE)  # the part has the pipe too, until it has ended
    assert checkpoint.exists(), said
    killed = json.loads((out / "manifest.json").read_text())
    made = timing.read_text().splitlines()
    second = subprocess.run(
        command, env=environment, cwd=bare, timeout=PATIENCE, check=False, **pipes
    )
    assert second.returncode == 0, second.stdout
    return out, killed, made, second.stdout


def test_a_killed_rehearsal_goes_on(rehearsed):
    out, killed, made, said = rehearsed
    manifest = json.loads((out / "manifest.json").read_text())
    names = list(PARTS)
    assert [p["status"] for p in killed["parts"].values()] == ["done"] * 4 + ["running"]
    assert list(manifest["parts"]) == names and manifest["profile"] == "gpu, rehearsed"
    assert all(part["status"] == "done" for part in manifest["parts"].values())
    for name in names[:-1]:  # not done again
        assert manifest["parts"][name] == killed["parts"][name] and f"{name}:" not in said
    plan = json.loads((out / "training" / "plan.json").read_text())["arms"]["crt2"]
    kept, timing = plan["checkpoint_every"], out / "training" / "crt2" / "timing.jsonl"
    lines = timing.read_text().splitlines()
    assert lines[:kept] == made[:kept] and len(lines) == plan["updates"]  # measured times: not anew
    assert len(manifest["calls"]) == 2 and manifest["calls"][0]["parts"] == names


def test_a_rehearsal_leaves_every_table(rehearsed):
    out, *_ = rehearsed
    checks = read_rows(out / "checks.csv")
    assert [row["check"] for row in checks] == list(CHECKS)
    assert all(row["passed"] == "yes" and row["apart"] <= row["bound"] for row in checks)
    steps = read_rows(out / "steps.csv")
    assert [row["memory_limit"] for row in steps] == ["6 GB", "none", "none"]
    assert all(0 < row["mfu"] < 1.5 and not row["error"] for row in steps)
    assert all(row["peak_memory_bytes"] > 1e6 for row in steps)
    decode = read_rows(out / "decode.csv")
    ways = {batch: [row["way"] for row in decode if row["batch"] == batch] for batch in (1, 8)}
    assert {"full depth", "no cache", "speculation from 1", "gate"} <= set(ways[1])
    assert "full depth" in ways[8] and all(row["tokens_per_second"] > 0 for row in decode)
    training = read_rows(out / "training.csv")
    for arm, exits in (("crt2", 4), ("gpt2", 1)):
        rows = [row for row in training if row["arm"] == arm]
        assert len(rows) == 2 * exits and {row["split"] for row in rows} == {"valid", "test"}
        assert all(1 < row["word_ppl"] < 50 for row in rows)
    made_on = json.loads((out / "manifest.json").read_text())["calls"][1]["environment"]
    assert made_on["device"] and made_on["versions"]["torch"] and made_on["library_sha256"]


def test_the_other_size_needs_another_folder(rehearsed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="'gpu, rehearsed', not 'gpu'"):
        run_gpu(rehearsed[0])


def test_bad_input_gets_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as a rehearsal sets it
    out = tmp_path / "out"
    for words, message in (
        ([], "no CUDA device"),
        (["--rehearse", "--minutes", "0"], "minutes is 0"),
        (["--rehearse", "--only", "tests"], "checks, memory, steps, decode, training"),
    ):
        with pytest.raises(SystemExit) as stopped:
            monkeypatch.setattr("sys.argv", ["gpu", "--out", str(out), *words])
            runpy.run_module("crt_lib.gpu", run_name="__main__")
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and message in err and len(err.splitlines()) == 1
        monkeypatch.setattr("sys.argv", ["crt", "gpu", "--out", str(out), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2 and capsys.readouterr().err == err
    assert not out.exists()
    out.mkdir()
    (out / "manifest.json").write_text('{"profile": "quick"}')
    with pytest.raises(InputError, match="another results folder"):
        run_gpu(out, rehearse=True)


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("crt_lib.gpu.parts.TO_BEGIN", 0)
    # for 1 of the 2,000 seconds
    parts = {"hangs": (0.2, hangs)} | {f.__name__: (100, f) for f in (raises, crashes, late, works)}
    assert run_parts(parts, tmp_path, minutes=33, toy=True) is False
    entries = json.loads((tmp_path / "manifest.json").read_text())["parts"]
    assert {name: (entry["status"], entry["error"]) for name, entry in entries.items()} == {
        "hangs": ("unfinished", "its time was up"),
        "raises": ("failed", "ValueError: no such day"),
        "crashes": ("failed", "its process crashed"),
        "late": ("failed", "InputError: half is done"),
        "works": ("done", None),
    }
    again = {name: parts[name] for name in ("late", "works")}
    assert run_parts(again, tmp_path, minutes=33, toy=True)
    assert len(read_rows(tmp_path / "works.csv")) == 1


def test_the_time_is_shared_among_those_that_wait(tmp_path, capsys):
    assert run_parts({"works": (1, works)}, tmp_path, minutes=0.1, toy=True) is False
    assert "no time is left" in capsys.readouterr().out and not (tmp_path / "works.csv").exists()
    parts = {"first": (1, works), "second": (3, works), "third": (1, works)}
    assert run_parts(parts, tmp_path, minutes=100, toy=True)
    said = capsys.readouterr().out
    times = [int(time) for time in re.findall("at most ([0-9]+) s", said)]
    assert times == pytest.approx([1199, 4490, 5980], abs=200)


def test_a_table_replaces_rows_of_the_same_key(tmp_path):
    table, key = tmp_path / "t.csv", ("name", "n")
    put_rows(table, [{"name": "a", "n": 1, "x": 1.5}, {"name": "a", "n": 2}], key)
    put_rows(table, [{"name": "a", "n": 1, "x": 2.5}], key)
    assert rows_of(table) == [{"name": "a", "n": 2, "x": None}, {"name": "a", "n": 1, "x": 2.5}]
    assert rows_of(table, n=1)[0]["x"] == 2.5 and not rows_of(table, name="b")


CHECKS_THAT_FAIL = """
import math
import torch

def ours(device, value):
    yield torch.tensor([2 + 2 * value]), torch.tensor([2.0])

def broken(device):
    raise RuntimeError("no kernel")

CHECKS = {
    "holds": (ours, 0.5, {"value": 0.5}),
    "apart": (ours, 0.5, {"value": 0.6}),
    "not a number": (ours, 0.5, {"value": math.nan}),
    "broken": (broken, 0.5, {}),
}
"""


def test_checks_that_do_not_hold_fail_the_part(tmp_path, monkeypatch):
    (tmp_path / "checks.py").write_text(CHECKS_THAT_FAIL)
    monkeypatch.setattr(gpuchecks, "CHECKS", tmp_path / "checks.py")
    with pytest.raises(RuntimeError, match="3 of 4 checks failed: apart, not a number, broken"):
        gpuchecks.run_checks(Job(tmp_path, True, time.time() + 60))
    rows = read_rows(tmp_path / "checks.csv")
    assert [row["passed"] for row in rows] == ["yes", "no", "no", "no"]
    assert rows[3]["error"] == "RuntimeError: no kernel"


@pytest.mark.parametrize(
    "name", ["logits", "gradients", "exits", "decoding with caches", "speculation", "audit"]
)
def test_a_check_sees_a_wrong_model(name, monkeypatch):
    right = CRT.apply_loop

    def wrong(self, loop, z, embedded, memory=None):
        """Another state without a memory or for a single position; the audit sees one token on."""
        z = right(self, loop, z, embedded, memory)
        if name == "audit":
            return z + 0.1 * z.roll(-1, 1)
        off = memory is None or z.shape[1] == 1
        return z + torch.linspace(-1, 1, z.shape[-1], dtype=z.dtype) if off else z

    monkeypatch.setattr(CRT, "apply_loop", wrong)
    if name in ("decoding with caches", "speculation"):
        step = Step.loop
        monkeypatch.setattr(Step, "loop", lambda self, n, z: step(self, n, z) + z.roll(1, -1))
    check, bound, options = CHECKS[name]
    assert gpuchecks.worst_apart(check(torch.device("cpu"), **options)) > bound


def test_the_arms_cost_the_same_and_learn_alike():
    chosen = arms(toy=False)
    sized = {n: p.model.replace(vocab_size=33_278) for n, p in chosen.items()}
    crt2 = chosen["crt2"]
    assert sum(parameters_by_part(sized["crt2"]).values()) == pytest.approx(24e6, rel=0.05)
    costs = [cost_of_a_token(config, crt2.train.seq_len) for config in sized.values()]
    assert costs[1] == pytest.approx(costs[0], rel=0.05)
    alike = {name: p.train.replace(max_lr=1.0) for name, p in chosen.items()}
    assert alike["crt2"] == alike["gpt2"]
    model = sized["crt2"]
    assert model.dropout == model.embed_dropout == sized["gpt2"].dropout == gputraining.DROPOUT
    assert model.attention_dropout is None  # as dropout


def test_a_training_goes_on_only_on_the_machine_of_its_plan(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "plan.json").write_text('{"device": "another one"}')
    with pytest.raises(InputError, match="begun on another one"):
        gputraining.run_training(Job(tmp_path, True, time.time() + 60))


def test_without_time_nothing_is_trained(tmp_path, monkeypatch):
    slow = SimpleNamespace(update_seconds=0.1, evaluation_seconds=4.0)
    monkeypatch.setattr(gputraining, "predict", lambda profile: slow)
    with pytest.raises(RuntimeError, match="no time"):
        gputraining.run_training(Job(tmp_path, True, time.time() + 9))
    assert not (tmp_path / "training").exists()
