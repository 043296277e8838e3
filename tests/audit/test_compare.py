"""Losses by document add up to the whole text's; intervals contain what they should."""

import math

import numpy as np
import pytest

from crt_lib import CRT, InputError, ModelConfig, evaluate, load_corpus, load_tokenizer, tokenize
from crt_lib.audit.compare import (
    compare_arms,
    difference_in_bits,
    document_of_tokens,
    exit_table,
    resampled,
    score_documents,
)

PARAGRAPHS = "First paragraph, naïve café.\n\n  Second one\nhas two lines.\n\nThird.\n\n"
LONG = "A line of this paragraph that is longer than fifty characters in all.\n"


def tokenized(folder, text, tokenizer="bpe:270"):
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(folder))
    return tokenize(corpus, load_tokenizer(tokenizer, corpus))


def model_of(data):
    size = data.tokenizer.vocab_size
    config = ModelConfig(vocab_size=size, d_model=16, n_heads=2, n_loops=2, exit_loops=(1,))
    return CRT(config).double()


def test_documents_add_up_to_the_text(tmp_path):
    data = tokenized(tmp_path, PARAGRAPHS * 9)
    model = model_of(data)
    scored = score_documents(model, data, "test", 16)
    whole = evaluate(model, data.test, data.tokenizer.eot_id, seq_len=16)
    texts = data.corpus.documents("test")
    assert scored.bytes.tolist() == [len(text.encode()) for text in texts]
    assert scored.tokens.sum() == len(data.test.ids) and (scored.tokens > 0).all()
    for row in whole.rows():
        assert scored.nll[row["exit"]].sum() == pytest.approx(row["loss"] * row["tokens"])
    with pytest.raises(InputError, match="no line over 50 characters"):
        score_documents(model, data, "test", 16, "released")


def test_lines_and_their_padding_belong_to_their_document(tmp_path):
    data = tokenized(tmp_path, f"{LONG * 3}\nShort.\n\n{LONG}")
    model = model_of(data)
    scored = score_documents(model, data, "test", 40, "released")
    whole = evaluate(model, data.test, data.tokenizer.eot_id, protocol="released", seq_len=40)
    per_line = scored.tokens.sum() // 4
    assert scored.tokens.tolist() == [3 * per_line, 0, per_line]
    for row in whole.rows():
        mean = scored.nll[row["exit"]].sum() / scored.tokens.sum()
        assert mean == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.parametrize("tokenizer", ["bpe:270", "word"])
def test_the_table_of_exits(tmp_path, tokenizer):
    lines = [f"Line {i} of the text, with more than fifty characters in it." for i in "abc"]
    data = tokenized(tmp_path, "\n\n".join(lines * 3) + "\n", tokenizer)
    model, eot = model_of(data), data.tokenizer.eot_id
    rows = exit_table(model, data, 16)
    honest = [row for row in rows if row["protocol"] == "honest"]
    losses = evaluate(model, data.valid, eot, seq_len=16).loss
    assert {row["exit"]: pytest.approx(row["loss"]) for row in honest} == losses
    assert [row["minus_last"] for row in honest] == pytest.approx([losses[1] - losses[2], 0])
    assert {row["protocol"] for row in rows} == {"honest", "released"}
    if tokenizer == "word":  # windows stand for documents
        assert len(score_documents(model, data, "test", 16).tokens) == -(-len(data.test.ids) // 16)
        with pytest.raises(InputError, match="does not keep the text's bytes"):
            document_of_tokens(data, "test")
    for row in rows:
        assert row["low"] <= row["loss"] <= row["high"]
        assert row["minus_low"] <= row["minus_last"] <= row["minus_high"]
    assert honest[1]["minus_low"] == honest[1]["minus_high"] == 0

    few = [row for row in exit_table(model, data, 16, 2) if row["protocol"] == "released"]
    lines = {"protocol": "released", "max_lines": 2, "seq_len": 384}
    scored = evaluate(model, data.valid, eot, **lines)
    assert scored.tokens == 2 * 383
    for row in few:  # one batch: its mean is the sum over its positions
        assert row["loss"] == pytest.approx(scored.loss[row["exit"]])


def test_the_interval_of_a_known_difference():
    rng = np.random.default_rng(0)
    sizes = rng.integers(500, 5000, size=60)
    base = sizes * rng.normal(1.2, 0.1, size=60)
    theirs = [base + rng.normal(0, 20, 60) for _ in range(3)]
    ours = [base - 0.05 * math.log(2) * sizes + rng.normal(0, 20, 60) for _ in range(3)]
    found = difference_in_bits(ours, theirs, sizes, samples=500)
    assert found.low < -0.05 < found.high < 0
    assert found.mean == pytest.approx(-0.05, abs=0.005)

    same = difference_in_bits(theirs, theirs, sizes, samples=500)
    assert same.mean == 0 and same.low <= 0 <= same.high
    with pytest.raises(InputError, match="two or more"):
        difference_in_bits(ours[:1], theirs, sizes)
    assert difference_in_bits(ours, theirs, sizes, samples=500) == found


def test_arms_are_compared_at_equal_budget():
    def rows(arm, bits, seeds, budget="9 updates", max_lr=1e-3):
        return [
            {"arm": arm, "budget": budget, "max_lr": max_lr, "seed": seed, "document": i}
            | {"bytes": 100 + i, "nll": bits * math.log(2) * (100 + i)}
            for seed in seeds
            for i in range(5)
        ]

    table = rows("a", 1.5, (0, 1)) + rows("b", 1.7, (0, 1)) + rows("b", 9.0, (0,), "1 min")
    table += rows("c", 1.4, (0,))
    ours, theirs, single = compare_arms(table, "a", ["b", "c", "absent"], "9 updates")
    assert single["ours_minus"] == pytest.approx(0.1) and "low" not in single
    assert ours == {"arm": "a", "seeds": 2, "bits_per_byte": pytest.approx(1.5)}
    assert theirs["bits_per_byte"] == pytest.approx(1.7) and theirs["seeds"] == 2
    for name in ("ours_minus", "low", "high"):
        assert theirs[name] == pytest.approx(-0.2)
    with pytest.raises(InputError, match="several learning rates"):
        compare_arms(table + rows("b", 1.0, (2,), max_lr=2e-3), "a", ["b"], "9 updates")
    with pytest.raises(InputError, match="no documents of d"):
        compare_arms(table, "d", ["a"], "9 updates")
    table[-1]["bytes"] += 1
    with pytest.raises(InputError, match="arm c was scored on other documents"):
        compare_arms(table, "a", ["c"], "9 updates")


def test_the_interval_covers_what_it_should():
    """Of intervals from three noisy seeds a side, about 95 % hold the true difference."""
    rng = np.random.default_rng(1)
    sizes = np.full(40, 1000)
    covered = 0
    for _ in range(200):
        noise = rng.normal(0, 30, (6, 1)) + rng.normal(0, 10, (6, 40))  # of training, of scoring
        sides = 1000 * math.log(2) * 1.3 + noise
        found = difference_in_bits(list(sides[:3]), list(sides[3:]), sizes, samples=1000)
        covered += found.low <= 0 <= found.high
    assert 185 <= covered <= 200


def test_an_interval_where_most_documents_have_no_tokens():
    """Those draws that hold none say nothing of the mean."""
    sums, tokens = np.zeros((40, 1)), np.zeros(40)
    sums[:2, 0], tokens[:2] = (20.0, 60.0), (10, 20)
    (found,) = resampled(sums, tokens, samples=500)
    assert found.low == 2.0 < found.mean < 3.0 == found.high
