"""What is counted of a corpus is what batches of it hold, and what is stored."""

import os

import numpy as np
import pytest
from closeness import SAME

from crt_lib import InputError, load_corpus, load_tokenizer, tokenize
from crt_lib.data import PaddedLines
from crt_lib.files import read_rows
from crt_lib.show.plots import results_folder
from crt_lib.text import stats


def test_statistics_count_every_line_and_the_padding_of_the_released_rows():
    corpus = load_corpus("grammar")
    grammar = tokenize(corpus, load_tokenizer("word", corpus))
    lengths = np.array([len(line) for line in grammar.train.lines])
    rows = stats.line_length_rows(grammar)
    assert sum(row["lines"] for row in rows) == len(lengths)
    assert rows[0]["lines"] == ((lengths >= 1) & (lengths <= 16)).sum()
    lines = grammar.valid.lines
    batch = PaddedLines(lines, 384, len(lines), 0, eot_id=-1).batch(0, 0)
    share = float((batch.inputs == -1).double().mean())
    train, valid, _ = stats.data_rows(grammar)
    assert valid["padding_share"] == pytest.approx(share, **SAME)
    kept = [line for line in corpus.train.text.splitlines(keepends=True) if len(line) > 50]
    assert train["kept_share"] == sum(map(len, kept)) / len(corpus.train.text)
    assert train["text_sha256"] == corpus.train.sha256


@pytest.mark.parametrize("seq_len", [16, 384])
def test_tokens_kept_of_cut_lines_follow_from_their_bins(seq_len):
    corpus = load_corpus("docstrings")
    data = tokenize(corpus, load_tokenizer("bpe:300", corpus))
    rows = stats.line_length_rows(data)
    cut = sum(min(len(line), seq_len) for line in data.train.lines)
    assert stats.kept_tokens(rows, seq_len) == cut
    share = 1 - cut / (seq_len * len(data.train.lines))
    assert stats.padding_share(data.train, seq_len) == pytest.approx(share, **SAME)
    with pytest.raises(InputError, match="seq_len is 17; it must be one of 16, 32"):
        stats.kept_tokens(rows, 17)


def test_lengths_count_every_document_and_every_line_that_is_not_blank():
    corpus = load_corpus("docstrings")
    counts = {}
    for row in stats.length_rows(corpus):
        counts.setdefault(row["of"], []).append(row["count"])
    assert list(map(len, counts.values())) == [50, 50]
    assert sum(counts["words in a document"]) == len(corpus.documents("train"))
    lines = [line for line in corpus.train.text.splitlines() if line.strip()]
    assert sum(counts["characters in a line"]) == len(lines)


def test_statistics_that_are_not_there_say_how_to_make_them(tmp_path):
    with pytest.raises(InputError, match="write_statistics"):
        stats.read_statistics(tmp_path)


@pytest.mark.skipif("CRT_DATA_ROOT" not in os.environ, reason="CRT_DATA_ROOT is not set")
def test_the_stored_counts_are_those_of_wikitext_2(tmp_path):
    stats.write_statistics(tmp_path, tokenizers=["word"])
    for name in ("data.csv", "line_lengths.csv"):
        stored = read_rows(results_folder("small") / name)
        stored = [row for row in stored if row["tokenizer"] == "word"]
        assert read_rows(tmp_path / name) == stored
    assert read_rows(tmp_path / "lengths.csv") == read_rows(results_folder("small") / "lengths.csv")
