"""Checks of what else makes a loss too good: each passes what is sound, and fails what it names."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from crt_lib import InputError
from crt_lib.audit import checks, flawed
from crt_lib.audit.protocols import PaddingReport
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.text import grammar, lookup
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import load_tokenizer

SHIFTED = {0: "inputs themselves", 1: "next token", 2: "shifted twice", -1: "come before"}


@given(st.sampled_from(list(SHIFTED)), st.integers(0, 9), st.floats(0, 0.4))
def test_targets_are_the_next_tokens(shift, seed, dropped):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(50, (3, 40), generator=generator)
    inputs, targets = rows[:, 4:30], rows[:, 4 + shift : 30 + shift].clone()
    targets[torch.rand(targets.shape, generator=generator) < dropped] = NOT_SCORED
    check = checks.targets_check(inputs, targets)
    assert check.passed == (shift == 1) and SHIFTED[shift] in check.says


def test_targets_that_follow_no_shift():
    inputs, targets = torch.randint(50, (2, 3, 40))
    assert not checks.targets_check(inputs, targets).passed
    with pytest.raises(InputError, match="differ"):
        checks.targets_check(inputs, targets[:, 1:])
    with pytest.raises(InputError, match="no target"):
        checks.targets_check(inputs, torch.full_like(inputs, NOT_SCORED))


@pytest.mark.parametrize("name", flawed.FLAWED)
def test_a_planted_flaw_fails_its_check(name):
    make, which = flawed.FLAWED[name]
    failed = [one.name for one in make() if not one.passed]
    assert len(failed) == 1 and failed[0].startswith(which)


@pytest.mark.parametrize("name", flawed.SOUND)
def test_a_sound_score_passes(name):
    found = flawed.SOUND[name]()
    assert all(one.passed for one in found), found


@given(st.integers(1, 90), st.integers(1, 20), st.data())
def test_each_token_is_scored_once(tokens, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    ids = np.random.default_rng(tokens).integers(0, 7, tokens)
    targets = [batch.targets for batch in evaluation_windows(ids, seq_len, 3, 0, stride)]
    assert checks.windows_check(ids, targets).passed
    twice = checks.windows_check(ids, [*targets, targets[0]])
    assert not twice.passed and f"of {tokens}; too many" in twice.says
    never = checks.windows_check(np.tile(ids, 3), targets)
    assert never.passed == (2 * tokens <= 1)


def test_no_loss_below_the_entropy_of_the_grammar():
    best = flawed.grammars_own()
    (check,) = flawed.FLAWED["a loss below the entropy at one position"][0]()
    assert "at position 50" in check.says and "entropy of grammar" in str(check)
    (check,) = checks.entropy_check(lambda ids: 0.3 * best(ids).clamp(min=-20), flawed.words())
    assert check.passed
    with pytest.raises(InputError, match="'wikitext-2' is not known"):
        checks.entropy_check(best, flawed.words(), "wikitext-2")


def test_alarms_on_perfect_models(monkeypatch):
    tokenizer, best, alarms = flawed.words(), flawed.grammars_own(), 0
    for seed in range(100):
        monkeypatch.setattr(checks, "_FRESH", 30_000 + seed)
        noise = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.3, tokenizer.vocab_size))
        (check,) = checks.entropy_check(
            lambda ids, noise=noise: best(ids) + noise, tokenizer, rows=8, length=16
        )
        alarms += not check.passed
    assert alarms <= 4  # 1 is expected at most


def test_no_loss_below_the_entropy_of_lookup():
    tokenizer = load_tokenizer("word", load_corpus("lookup"))
    floors = torch.from_numpy(lookup.surprisals()[1:])
    assert math.isclose(lookup.surprisals().sum(), lookup.entropy_rate() * lookup.LENGTH)

    def below(by):
        def model(ids):
            """The true word has the probability that the language gives it, or more."""
            words = torch.from_numpy(tokenizer.encode(lookup.sample(8, checks._FRESH)))
            targets = words.long().view(8, -1)[:, 1:]
            right = (-floors + by).clamp(max=-1e-9)
            others = torch.log((1 - right.exp()) / (tokenizer.vocab_size - 1))
            there = F.one_hot(targets, tokenizer.vocab_size).bool()
            return torch.where(there, right[:, None], others[:, None])

        return model

    assert checks.entropy_check(below(0.0), tokenizer, "lookup", rows=8)[0].passed
    assert not checks.entropy_check(below(0.1), tokenizer, "lookup", rows=8)[0].passed


def test_surprisals_sum_to_the_probability_of_the_text():
    text = grammar.sample(20, seed=5)
    assert math.isclose(-sum(grammar.surprisals(text)), grammar.log_prob(text))
    assert len(grammar.surprisals(text)) == len(text.replace("\n", " . ").split())


def test_scored_padding():
    report = PaddingReport(0.8, {0: 1.0, 2: 5.0}, {0: 5.0, 2: 5.0}, {0: 5.0, 2: 5.0})
    first, second = checks.padding_check(report)
    assert not first.passed and "80%" in first.says and str(first).startswith("FAILS: padding")
    assert second.passed and "exit 2" in second.name


def test_a_tokenizer_that_loses_text():
    texts = ["one  two", "one"]
    lost = checks.tokenizer_check(str.split, " ".join, texts)
    assert not lost.passed and "1 of 2" in lost.says and "' two' comes back as 'two'" in lost.says
