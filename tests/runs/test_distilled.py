"""A distilled run: it begins where the other ended, and goes on bit for bit."""

import json
import os
import signal
from itertools import count

import pytest
import torch

from crt_lib import InputError, load_profile
from crt_lib.checkpoint import RunFolder, load_model
from crt_lib.exits.distil import DistilledLosses
from crt_lib.files import sha256
from crt_lib.runs.distilled import distil_run
from crt_lib.runs.run import run_profile


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    profile = load_profile("smoke")
    short = profile.train.replace(updates=3, eval_every=0, checkpoint_every=2)
    run_profile(profile.replace(train=short), folder, progress=False)
    return folder


def distilled(run, out, **how):
    how = {"settings": {"updates": 4, "max_lr": 1e-3}, "progress": False} | how
    return distil_run(run, out, **how)


def test_it_begins_with_the_weights_of_the_run(run, tmp_path):
    distilled(run, tmp_path, settings={"updates": 1, "max_lr": 1e-12})
    weights = [load_model(RunFolder(f).checkpoint("best")).state_dict() for f in (run, tmp_path)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-9)
    kept = json.loads((tmp_path / "manifest.json").read_text())["train"]["train"]
    digest = sha256(RunFolder(run).checkpoint("best").read_bytes())[:12]
    assert kept["origin"] == f"{digest}, taught by {digest}, share 1"
    assert kept["aux_weight"] == 0.75 and kept["exits_trained"] == "all"


def test_stopped_and_begun_again_it_ends_with_the_same_file(run, tmp_path, monkeypatch):
    how = {"written": True}
    distilled(run, tmp_path / "whole", **how)
    calls, losses = count(1), DistilledLosses.__call__

    def stop_at_the_third(*given, **targets):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*given, **targets)

    with monkeypatch.context() as patched:
        patched.setattr(DistilledLosses, "__call__", stop_at_the_third)
        assert distilled(run, tmp_path / "parts", **how) is None
    distilled(run, tmp_path / "parts", **how)
    files = [RunFolder(tmp_path / name).checkpoint("best") for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_it_does_not_take(run, tmp_path):
    for how, said in (
        ({"share": 1.5}, "share is 1.5"),
        ({"out": run}, "holds a model that this begins with"),
        ({"teachers": [tmp_path / "none"]}, "there is no checkpoint"),
        ({"settings": {"rate": 1}}, "has no field 'rate'"),
        ({"settings": {"seq_len": 8}, "written": True}, "rows of 8 tokens"),
    ):
        with pytest.raises(InputError, match=said):
            distilled(run, **{"out": tmp_path / "new", **how})
    assert not (tmp_path / "new").exists()


def test_another_teacher_is_another_training(run, tmp_path):
    distilled(run, tmp_path, settings={"updates": 2})
    with pytest.raises(InputError, match=r"train\.origin was"):
        distilled(run, tmp_path, settings={"updates": 2}, share=0.5)
