"""What the two protocols score, and laws that any scorer must keep."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from closeness import EXACT, SAME, same
from torch import nn

from crt_lib import InputError, evaluate
from crt_lib.audit.protocols import evaluate_deployable
from crt_lib.data import evaluation_lines, evaluation_windows
from crt_lib.evaluate import token_losses
from crt_lib.model import CRT
from crt_lib.runs.profiles import load_profile
from crt_lib.text import grammar
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import load_tokenizer, tokenize


@cache
def data():
    corpus = load_corpus("grammar")
    return tokenize(corpus, load_tokenizer("word", corpus))


def model(**changes) -> CRT:
    torch.manual_seed(0)
    model = load_profile("smoke", "paper").model
    config = model.replace(vocab_size=data().tokenizer.vocab_size, **changes)
    return CRT(config).eval().double()


class Uniform(nn.Module):
    def forward(self, ids):
        return torch.zeros(*ids.shape, data().tokenizer.vocab_size, dtype=torch.float64)


class Bigram(nn.Module):
    """Relative frequencies of word pairs: the best causal model of a first-order chain."""

    def __init__(self, ids: np.ndarray, vocab_size: int):
        super().__init__()
        counts = torch.full((vocab_size, vocab_size), 1e-3, dtype=torch.float64)
        pairs = torch.from_numpy(ids.astype(np.int64))
        counts.index_put_((pairs[:-1], pairs[1:]), torch.ones(1, dtype=torch.float64), True)
        self.log_probs = (counts / counts.sum(1, keepdim=True)).log()

    def forward(self, ids):
        return self.log_probs[ids]


@pytest.mark.parametrize("protocol", ["honest", "released"])
def test_a_uniform_model_scores_log_v(protocol):
    result = evaluate(Uniform(), data().valid, data().tokenizer.eot_id, protocol=protocol)
    assert result.loss[0] == pytest.approx(math.log(data().tokenizer.vocab_size), **SAME)


def test_a_bigram_model_reaches_the_entropy_of_the_grammar():
    bigram = Bigram(data().train.ids, data().tokenizer.vocab_size)
    result = evaluate(bigram, data().test, data().tokenizer.eot_id)
    exact = -grammar.log_prob(data().test.text) / data().test.n_words
    assert result.loss[0] == pytest.approx(exact, rel=0.01)
    assert result.loss[0] > exact - 1e-3  # nothing causal is below the source's own probability
    assert exact == pytest.approx(data().corpus.entropy, rel=0.03)


def test_every_token_of_the_text_is_scored_once():
    result = evaluate(Uniform(), data().valid, 0, seq_len=100, stride=37, batch_size=3)
    split = data().valid
    assert (result.tokens, result.words) == (len(split.ids), split.n_words)
    assert result.original_bytes == len(split.text.encode())
    (row,) = result.rows(split="valid")
    assert row["bits_per_byte"] == pytest.approx(
        result.loss[0] * result.tokens / math.log(2) / split.n_bytes
    )
    assert row["word_ppl"] == pytest.approx(
        math.exp(result.loss[0] * result.tokens / split.n_words)
    )


def test_batch_sizes_change_nothing_and_training_goes_on():
    crt = model().train()
    first, *others = (
        evaluate(crt, data().valid, 0, seq_len=64, batch_size=size, max_tokens=1500).loss
        for size in (1, 4, 7)
    )
    for other in others:
        assert other == pytest.approx(first, **SAME)
    assert crt.training


def test_released_is_the_mean_of_batch_means_with_padding():
    crt = model(causal=False)
    result = evaluate(crt, data().valid, 0, protocol="released", seq_len=48, batch_size=8)
    means = []
    for batch in evaluation_lines(data().valid.lines, 48, 8, 0):
        with torch.no_grad():
            logits = crt(batch.inputs)[4][:, :-1]
        means.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), batch.inputs[:, 1:].flatten()).item()
        )
    assert result.loss[4] == pytest.approx(float(np.mean(means)), **SAME)


def test_deployable_equals_the_windows_of_a_causal_model_only():
    ids, differences = data().valid.ids, {}
    for causal in (True, False):
        crt = model(causal=causal)
        deployable = evaluate_deployable(crt, ids, 0, seq_len=24, windows=4, seed=3)
        starts = np.random.default_rng(3).integers(0, len(ids) - 24, 4)
        rows = torch.from_numpy(np.stack([ids[s : s + 25] for s in starts]).astype(np.int64))
        window = token_losses(crt, rows[:, :-1], rows[:, 1:])
        differences[causal] = max(
            abs(deployable.loss[k] - window[k].mean().item()) for k in deployable.loss
        )
        assert deployable.tokens == 4 * 24
    assert differences[True] < EXACT < 1e-3 < differences[False]


def test_more_context_is_what_a_stride_buys():
    """The last window scores its last 16 tokens, as a window of those 64 cut by hand does."""
    crt, ids = model(), data().valid.ids[:96]
    last = list(evaluation_windows(ids, 64, 1, 0, stride=16))[-1]
    scored = token_losses(crt, last.inputs, last.targets)[4]
    row = torch.from_numpy(ids[31:].astype(np.int64))[None]
    by_hand = token_losses(crt, row[:, :-1], row[:, 1:])[4]
    assert int((scored != 0).sum()) == 16
    same(scored[0, -16:], by_hand[0, -16:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "fair"}, "'honest' or 'released'"),
        ({"protocol": "released", "stride": 8}, "no stride"),
        ({"seq_len": 64, "stride": 65}, "stride is 65"),
        ({"seq_len": 4096}, "max_seq_len"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(model(), data().valid, 0, **arguments)
