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
    assert stats.data_rows(grammar)[1]["padding_share"] == pytest.approx(share, **SAME)


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
