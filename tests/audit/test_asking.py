"""How anybody's model is asked: what it may do, what it may not, and how that is said.

A sound model is cleared whatever its numbers are, and left as it was; what is no model, or does not
give logits, is an InputError.
"""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crt_lib import causality_report
from crt_lib.audit.asking import Asked
from crt_lib.audit.zoo import VOCAB, Mixed, ahead, batch_norm, gpt2, one_hot
from crt_lib.files import InputError

LENGTH = 16


@pytest.mark.parametrize("given", [None, "text", [1], {"logits": 1}, torch.zeros(1, VOCAB)])
def test_what_is_no_model_or_gives_no_logits_is_said(given):
    with pytest.raises(InputError, match="is no model"):
        causality_report(given, VOCAB)
    with pytest.raises(InputError, match=r"the model gives .* \(1, 24\), not \(B, T, V\)"):
        causality_report(lambda ids: given, VOCAB)


def test_a_model_that_exits_is_not_cleared():
    with pytest.raises(InputError, match="ends the process: SystemExit"):
        causality_report(lambda ids: sys.exit(0), VOCAB)


class Softened(nn.Module):
    """transformers' GPT-2 in bfloat16, its last step in float32: no value shows the rounding."""

    def __init__(self):
        super().__init__()
        self.model = gpt2().bfloat16()

    def forward(self, ids):
        logits = self.model(ids).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        return 30 * torch.tanh(logits.to(wide) / 30)


@pytest.mark.parametrize("as_a_function", [False, True])
def test_what_16_bits_within_a_model_round_is_no_leak(as_a_function):
    torch.manual_seed(0)
    model = Softened().eval()
    report = causality_report(model.forward if as_a_function else model, VOCAB, seconds=1)
    assert report.status == 0, str(report)
    where = report.findings["prefix"][0]
    assert where.largest <= where.tolerance


def test_a_model_may_write_into_its_ids():
    report = causality_report(lambda ids: one_hot(ids.clamp_(min=1)), VOCAB, context=64)
    assert report.status == 0 and "tokens" in report.findings


def test_differences_of_rows_with_their_own_bases():
    asked = Asked(lambda ids: F.one_hot(ids, 5).float(), torch.zeros(1, 4, dtype=torch.long), 5)
    rows = torch.randint(5, (150, 4))
    found = asked.differences(asked.others(rows, 0), rows)[0]
    assert found.shape == (150, 4) and (found == 1).all()
    assert len(asked.differences(rows, rows, seconds=0, least=65)[0]) == 128


@pytest.mark.parametrize("leaks", [False, True])
def test_infinite_logits(leaks):
    model = Mixed(*[ahead(5)] * leaks)

    def masked(ids):
        """No token may be said twice in a row."""
        with torch.no_grad():
            logits = model(ids).masked_fill(F.one_hot(ids, VOCAB).bool(), -torch.inf)
        logits[..., -3:] = -torch.inf
        return logits

    assert causality_report(masked, VOCAB, length=LENGTH).leaks == leaks
    with pytest.raises(InputError, match="not numbers"):
        causality_report(lambda ids: masked(ids) * 0, VOCAB, length=LENGTH)


def test_a_probe_at_which_the_model_fails_is_left_out():
    def only_24(ids):
        if ids.shape[1] != 24 or len(ids) > 1:
            raise RuntimeError("24 tokens, please")
        return F.one_hot(ids, VOCAB).float()

    report = causality_report(only_24, VOCAB)
    assert report.status == 0 and report.context == 24
    assert all("24 tokens, please" in report.left_out[name] for name in ("prefix", "rows"))
    with pytest.raises(InputError, match="fails on ids of shape"):
        causality_report(only_24, VOCAB, length=12)
    with pytest.raises(InputError, match="rows of 24 tokens, not of 30"):
        causality_report(only_24, VOCAB, context=30)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"vocab_size": -1}, {"vocab_size": 2.5}, {"context": -3}, {"context": 10**12}),
        *({"length": 1}, {"length": 2.5}, {"seed": -1}, {"seconds": math.nan}, {"seconds": "x"}),
    ],
)
def test_numbers_that_cannot_be_asked_with_are_named(wrong):
    (name,) = wrong
    given = {"vocab_size": VOCAB} | wrong
    with pytest.raises(InputError, match=f"^{name} is .*; give a (whole )?number"):
        causality_report(lambda ids: F.one_hot(ids, VOCAB).float(), **given)


def test_positions_and_vocabulary_are_found():
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.positions = Mixed(), nn.Parameter(torch.zeros(77, VOCAB))
            self.inner.config = None

        def forward(self, ids):
            return self.inner(ids) + self.positions[: ids.shape[1]]

    report = causality_report(Within())
    assert report.context == 77 and f"of {VOCAB} tokens" in report.covered["vocabulary"]
    with pytest.raises(InputError, match="give --vocab-size"):
        causality_report(lambda ids: 1 / 0)


def test_the_model_is_left_as_it_was():
    model = batch_norm(True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    causality_report(model, VOCAB, length=4)
    assert model.training and model.part.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpys).all()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_remembers_cannot_be_judged():
    last = [torch.zeros(1, 1, dtype=torch.long)]

    def remembers(ids):
        before, last[0] = last[0], ids
        return F.one_hot(ids, VOCAB) + 0.1 * F.one_hot(before, VOCAB).float().mean((0, 1))

    with pytest.raises(InputError, match="the model remembers"):
        causality_report(remembers, VOCAB)
