"""Generated text: cached or not it is the same; a seed repeats it; what is never written is not."""

import gc
import math
import weakref
from unittest.mock import patch

import pytest
import torch
from closeness import near
from hypothesis import given, strategies as st
from tiny_models import ALL_OPTIONS, exact_model

from crt_lib import InputError
from crt_lib.cached.memory import Memory
from crt_lib.exits.decode import Sampling, draw, generate
from crt_lib.exits.policy import Policy
from crt_lib.exits.speculate import Speculation

PROMPTS = [[1, 2, 3], [5], [4, 5, 6, 7, 8]]
SAMPLED = Sampling(temperature=1.0, top_k=12, top_p=0.9)
EARLY = Policy("confidence", tau0=0.1, tau_min=0.0)


def test_caches_are_free_when_the_text_is_written(trained):
    """Also where no cycle of references is looked for."""
    kept, made = [], Memory.__init__

    def noted(self, *how, **more):
        made(self, *how, **more)
        kept.append(weakref.ref(self))

    gc.disable()
    try:
        with patch.object(Memory, "__init__", noted):
            generate(trained, PROMPTS, 4)
            Speculation(trained, 1).generate(PROMPTS[0], 4)
        assert kept and not any(ref() for ref in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("changes", [{}, ALL_OPTIONS], ids=["paper", "all options"])
@pytest.mark.parametrize("policy", [Policy(), EARLY, Policy(fixed=1)], ids=["full", "early", "1"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_with_and_without_a_cache(changes, policy, sampling):
    model = exact_model(**changes)
    fast, slow = (
        generate(model, PROMPTS, 12, policy=policy, sampling=sampling, seed=4, cache=cache)
        for cache in (True, False)
    )
    assert fast == slow
    assert all(len(generated.tokens) == 12 for generated in fast)
    if policy.fixed:
        assert {loop for generated in fast for loop in generated.loops} == {1}


def test_rows_of_a_batch_do_not_see_each_other():
    model = exact_model()
    together = generate(model, PROMPTS, 10, policy=EARLY)
    assert together == [generate(model, [prompt], 10, policy=EARLY)[0] for prompt in PROMPTS]


def test_a_seed_repeats_the_text():
    model = exact_model()
    first, again, other = (
        generate(model, PROMPTS, 20, sampling=SAMPLED, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_stop_ends_a_row():
    model = exact_model()
    (whole,) = generate(model, [[1, 2]], 20)
    stop = whole.tokens[4]
    (ended,) = generate(model, [[1, 2]], 20, stop=stop)
    assert ended.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    for loop in (0, 1):
        assert Speculation(model, loop).generate([1, 2], 20, stop=stop).tokens == ended.tokens


@given(
    never=st.sets(st.integers(0, 20), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 1.5]),
    loop=st.sampled_from([0, 1, 2, 3]),
)
def test_what_is_never_written(trained, never, temperature, loop):
    """It is not there, and the rest is as if its logits had been the lowest."""
    sampling = Sampling(temperature, never=tuple(never))
    (plain,) = generate(trained, [[3, 4]], 16, sampling=sampling)
    draft = Speculation(trained, loop).generate([3, 4], 16, sampling=sampling)
    assert never.isdisjoint(plain.tokens) and never.isdisjoint(draft.tokens)
    if temperature == 0:
        assert draft.tokens == plain.tokens
        (free,) = generate(trained, [[3, 4]], 1)
        assert free.tokens[0] in never or free.tokens == plain.tokens[:1]


@pytest.mark.parametrize("never", [(99,), (-1,), tuple(range(46))])
def test_something_must_be_left_to_write(trained, never):
    assert trained.config.vocab_size == 46
    sampling = Sampling(never=never)
    with pytest.raises(InputError, match="never"):
        generate(trained, [[3]], 2, sampling=sampling)
    with pytest.raises(InputError, match="never"):
        Speculation(trained, 1).generate([3], 2, sampling=sampling)


def test_tokens_are_drawn_as_often_as_their_weights_say():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0])  # whose sum is not 1
    rows = draw(weights.expand(60_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(rows, minlength=6)
    expected = 60_000 * weights / 6
    assert (counts[weights == 0] == 0).all()
    chi = ((counts - expected) ** 2 / expected)[weights > 0].sum()
    assert chi < 13.8  # of two degrees of freedom: by chance once in a thousand


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_weights_of_which_none_can_be_drawn(bad):
    weights = torch.ones(2, 5)
    weights[1] = bad
    with pytest.raises(InputError, match="no token can be drawn"):
        draw(weights, torch.Generator())


def test_sampling_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    p = logits.softmax(-1)[0]
    assert Sampling().probabilities(logits).tolist() == [[0, 0, 0, 1]]
    two = Sampling(1.0, top_k=2).probabilities(logits)[0]
    near(two, torch.tensor([0, 0, p[2], p[3]]) / (p[2] + p[3]), 8)  # sums of four, twice
    nucleus = Sampling(1.0, top_p=float(p[3]) + 0.01).probabilities(logits)[0]
    near(nucleus, two, 8)
    assert Sampling(1.0, top_p=0.01).probabilities(logits).tolist() == [[0, 0, 0, 1]]
    assert Sampling(1e-45).probabilities(logits).tolist() == [[0, 0, 0, 1]]
    warm = Sampling(2.0).probabilities(logits)
    near(warm, (logits / 2).softmax(-1), 8)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 3, "no prompt"),
        ([[1], []], 3, "a prompt is empty"),
        ([[37]], 3, "outside the vocabulary 0..36"),
        ([[-1]], 3, "outside the vocabulary 0..36"),
        ([[1]], -1, "new_tokens is -1"),
        ([[1]], 1.5, "new_tokens is 1.5"),
        (None, 1, "lists of token ids"),
        ([["x"]], 1, "lists of token ids"),
        ([[1.5]], 1, "lists of token ids"),
        ([[1] * 60], 5, "60 tokens of prompt and 5 new ones.*64 positions"),
    ],
)
def test_prompts_that_cannot_be(prompts, new, message):
    with pytest.raises(InputError, match=message):
        generate(exact_model(), prompts, new)


def test_a_prompt_that_fills_the_positions():
    model = exact_model()
    assert len(generate(model, [[1] * 63], 1)[0].tokens) == 1
    assert generate(model, [[1] * 64], 0)[0].tokens == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_samplings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        Sampling(**changes)


def test_what_cannot_run():
    for run, message in (
        (lambda: Speculation(exact_model(), 4), r"loop 4 cannot draft.*\(1, 3\)"),
        (lambda: generate(exact_model(causal=False), [[1]], 3), "sees the future"),
        (lambda: generate(exact_model(), [[1]], 3, policy="gate"), "give a Policy, not a str"),
        (lambda: generate(object(), [[1]], 3), "give a CRT, not a object"),
    ):
        with pytest.raises(InputError, match=message):
            run()
