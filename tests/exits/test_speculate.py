"""Speculated text is that of full depth, greedy or sampled, whoever drafts."""

from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import given, strategies as st
from tiny_models import exact_model

from crt_lib import InputError
from crt_lib.cached.step import Step
from crt_lib.exits import speculate
from crt_lib.exits.decode import Sampling, generate
from crt_lib.exits.policy import Policy
from crt_lib.exits.speculate import Speculation


@given(
    prompt=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    new=st.integers(0, 24),
    longest=st.integers(1, 6),
    loop=st.sampled_from([0, 1, 2, 3]),
    shortlist=st.sampled_from([2048, 1, 9]),
    sure=st.sampled_from([0.0, 0.7]),
)
def test_speculated_greedy_text_is_the_plain_one(
    trained, prompt, new, longest, loop, shortlist, sure
):
    (plain,) = generate(trained, [prompt], new)
    with patch.multiple(speculate, LONGEST=longest, SHORTLIST=shortlist, SURE=sure):
        speculated = Speculation(trained, loop).generate(prompt, new)
    assert (speculated.tokens, speculated.loops) == (plain.tokens, plain.loops)
    assert 0 <= speculated.accepted <= speculated.drafted


def test_a_rare_token_of_the_text_can_be_drafted(trained, monkeypatch):
    monkeypatch.setattr(speculate, "SHORTLIST", 1)
    draft = Speculation(trained, 1)
    (plain,) = generate(trained, [[5, 6]], 40)
    assert draft.generate([5, 6], 40).accepted > 0
    assert draft.generate([5, 6], 40).tokens == plain.tokens


def test_a_draft_ends_where_it_is_not_sure(trained):
    def counts(sure):
        with patch.object(speculate, "SURE", sure):
            made = [Speculation(trained, 1).generate([token], 40) for token in range(8)]
        assert all(drafted <= speculate.LONGEST for one in made for drafted, _ in one.verified)
        return sum(one.drafted for one in made)

    assert 0 == counts(100.0) < counts(0.7) < counts(0.0)


def test_drafts_are_kept_and_thrown_away(trained, monkeypatch):
    monkeypatch.setattr(speculate, "SURE", 0.0)

    def counts(model):
        made = [Speculation(model, 1).generate([token], 40) for token in range(8)]
        return sum(one.accepted for one in made), sum(one.drafted for one in made)

    accepted, drafted = counts(trained)
    assert accepted > 0.2 * drafted
    accepted, drafted = counts(exact_model())
    assert accepted < drafted


@pytest.mark.parametrize(
    ("loop", "prompt", "shortlist"),
    [(1, [3, 4], 2048), (1, [3, 4], 12), (0, [3, 4, 5, 3, 4, 6, 3, 4], 2048)],
)
def test_speculation_keeps_the_distribution(trained, loop, prompt, shortlist, monkeypatch):
    """Two samples of the same distribution: the chi-square of their counts stays near its mean."""
    runs, sampling = 600, Sampling(temperature=1.5, top_k=3)
    plain = generate(trained, [prompt] * runs, 3, sampling=sampling, seed=0)
    counts = Counter(tuple(generated.tokens) for generated in plain)
    monkeypatch.setattr(speculate, "SHORTLIST", shortlist)
    draft = Speculation(trained, loop)
    made = [draft.generate(prompt, 3, sampling=sampling, seed=seed) for seed in range(runs)]
    assert 0 < sum(one.accepted for one in made) < sum(one.drafted for one in made)
    other = Counter(tuple(one.tokens) for one in made)
    texts = [text for text in counts | other if counts[text] + other[text] >= 10]
    statistic = sum((counts[t] - other[t]) ** 2 / (counts[t] + other[t]) for t in texts)
    freedom = len(texts) - 1
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_text_that_repeats_drafts_itself(trained):
    """Greedy text ends in a cycle, of which whole drafts are kept, also beyond what is written."""
    (plain,) = generate(trained, [[5, 6]], 50)
    made = Speculation(trained, 0).generate([5, 6], 50)
    assert made.tokens == plain.tokens and made.accepted > 25
    assert max(kept for _, kept in made.verified) > 3
    grown = [drafted for drafted, _ in made.verified]
    assert max(grown) <= speculate.LONGEST and grown[0] <= speculate.GROWS


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_text_drafts_for_an_exit_too(trained, last):
    model = trained
    (plain,) = generate(model, [[5, 6]], 40, policy=Policy(fixed=last))
    made = Speculation(model, last=last).generate([5, 6], 40)
    assert (made.tokens, made.loops) == (plain.tokens, plain.loops)
    assert made.accepted > 10


def test_what_cannot_draft(trained):
    for how, message in (
        ({"draft_loop": 4}, r"loop 4 cannot draft.*\(1, 2, 3\)"),
        ({"last": 5}, r"loop 5 cannot be the last where the text drafts.* \(1, 2, 3, 4\)"),
        ({"draft_loop": 1, "last": 2}, r"loop 2 cannot .* where loop 1 drafts; .*of \(4,\)"),
    ):
        with pytest.raises(InputError, match=message):
            Speculation(trained, **how)


@pytest.mark.parametrize("loop", [0, 1])
def test_a_stop_inside_a_draft_ends_the_text_there(trained, loop, monkeypatch):
    monkeypatch.setattr(speculate, "SURE", 0.0)
    (plain,) = generate(trained, [[5, 6]], 40)
    inside = 0
    for stop in set(plain.tokens):
        (wanted,) = generate(trained, [[5, 6]], 40, stop=stop)
        heard: list[int] = []
        made = Speculation(trained, loop).generate([5, 6], 40, stop=stop, each=heard.extend)
        assert made.tokens == heard == wanted.tokens
        assert sum(kept + 1 for _, kept in made.verified) == len(heard)
        drafted, kept = made.verified[-1]
        inside += kept < drafted
    assert inside


@pytest.mark.parametrize(
    ("prompt", "drafted"),
    [([1, 2, 3, 9, 2, 4, 1, 2], [3, 9, 2]), ([1, 2, 3, 9, 2, 4, 7, 2], [4, 7, 2]), ([1, 2], [])],
    ids=["the last two", "the last one", "neither"],
)
def test_what_followed_is_the_draft(trained, prompt, drafted, monkeypatch):
    asked = []
    read = Step.read
    monkeypatch.setattr(
        Step, "read", lambda self, ids, last: asked.append(ids.tolist()) or read(self, ids, last)
    )
    Speculation(trained).generate(prompt, 8)
    assert asked[0] == [prompt[-1], *drafted]


def test_where_nothing_may_be_drafted_nothing_is(trained, monkeypatch):
    monkeypatch.setattr(speculate, "SHORTLIST", 3)
    sampling = Sampling(never=(0, 1, 2))
    (plain,) = generate(trained, [[3]], 12, sampling=sampling)
    assert Speculation(trained, 1).generate([3], 12, sampling=sampling).tokens == plain.tokens


def test_a_token_that_is_new_is_followed_by_no_draft(trained):
    assert Speculation(trained, 0).generate([3, 4, 5], 1).verified == [(0, 0)]
    assert Speculation(trained, 0).generate([3, 4, 5], 2).verified[0] == (0, 0)
