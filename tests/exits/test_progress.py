"""A terminal sees how far what takes long is; what is not a terminal sees nothing of it."""

import io
import sys

import numpy as np
import pytest
import torch.nn.functional as F
from tiny_models import random_model

from crt_lib import causality_report, load_profile
from crt_lib.audit import causality
from crt_lib.exits import scoring
from crt_lib.exits.gate import fit_gate
from crt_lib.runs.run import run_profile


class Terminal(io.StringIO):
    def isatty(self):
        return True


def gate(folder):
    fit_gate(random_model(), np.arange(300) % 37, 0, seq_len=10)


def audit(folder):
    causality_report(lambda ids: F.one_hot(ids, 9).float(), 9, context=30)


def run(folder):
    """Training, and evaluating what was trained."""
    corpus = folder / "text"
    corpus.mkdir()
    for name in ("train", "valid", "test"):
        text = " \n".join(f"the cat {i} saw a dog and the dog saw {name} \n" for i in range(60))
        (corpus / f"{name}.txt").write_text(text)
    profile = load_profile("smoke").replace(corpus=str(corpus), tokenizer="bpe:260")
    train = profile.train.replace(updates=2, eval_every=0)
    run_profile(profile.replace(train=train), folder / "run")


@pytest.mark.parametrize("work, said", [(gate, "it/s"), (audit, "probes"), (run, "evaluating")])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_is_for_terminals(work, said, stream, tmp_path, monkeypatch):
    for module in (scoring, causality):
        monkeypatch.setattr(module, "DELAY", 0)
    monkeypatch.setattr(sys, "stderr", shown := stream())
    work(tmp_path)
    if stream is Terminal:
        assert said in shown.getvalue() and (work is not run or "update" in shown.getvalue())
    else:
        assert shown.getvalue() == ""
