"""What a corpus and a tokenizer come to in numbers: counts, bytes a token, padding.

Counts only: the tables can be published where the text itself cannot.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crt_lib.data import PaddedLines
from crt_lib.evaluate import RELEASED_SEQ_LEN
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.text.corpus import SPLITS, load_corpus
from crt_lib.text.tokenizer import TokenizedCorpus, TokenSplit, load_tokenizer, tokenize

BIN = 16  # tokens; a bin of `line_length_rows`
MEASURED = ("gpt2", "bpe:8192", "word")  # tokenizers that a closed-vocabulary corpus can take


def data_rows(data: TokenizedCorpus) -> list[dict[str, Any]]:
    """A row a split: tokens, words, bytes, bytes a token; lines and padding of the released rows.

    `lines` are those longer than 50 characters, `padding_share` the share of padding when each is
    cut or padded to 384 tokens; None for a split without such a line.
    """
    return [
        {
            "corpus": data.corpus.name,
            "tokenizer": data.tokenizer.name,
            "vocab_size": data.tokenizer.vocab_size,
            "split": name,
            "tokens": len(split.ids),
            "words": split.n_words,
            "bytes": split.n_bytes,
            "bytes_per_token": split.n_bytes / len(split.ids),
            "lines": len(split.lines),
            "padding_share": padding_share(split),
        }
        for name, split in ((name, data.split(name)) for name in SPLITS)
    ]


def padding_share(split: TokenSplit, seq_len: int = RELEASED_SEQ_LEN) -> float | None:
    """Share of the positions of the split's rows that hold padding; None without a row."""
    if not split.lines:
        return None
    eot_id = split.tokenizer.eot_id
    return PaddedLines(split.lines, seq_len, batch_size=1, seed=0, eot_id=eot_id).padding_share


def line_length_rows(data: TokenizedCorpus) -> list[dict[str, Any]]:
    """How many lines of train over 50 characters have `shortest`..`longest` tokens, in bins of 16.

    What is longer than 384 tokens, the length at which the released script cuts, is one bin with
    `longest` None.
    """
    first = np.arange(1, RELEASED_SEQ_LEN + 2, BIN)
    counts, _ = np.histogram(list(map(len, data.train.lines)), [*first, np.inf])
    longest = [*(first[1:] - 1).tolist(), None]
    names = {"corpus": data.corpus.name, "tokenizer": data.tokenizer.name, "split": "train"}
    return [
        names | {"shortest": shortest, "longest": last, "lines": count}
        for shortest, last, count in zip(first.tolist(), longest, counts.tolist(), strict=True)
    ]


def write_statistics(out: str | Path, tokenizers: Sequence[str] = MEASURED) -> None:
    """Measure WikiText-2 with each tokenizer: `out`/data.csv and `out`/line_lengths.csv.

    Raises InputError when the corpus or a tokenizer cannot be had; nothing is written then.
    """
    text = load_corpus("wikitext-2")
    measured = [tokenize(text, load_tokenizer(name, text)) for name in tokenizers]
    for file, rows_of in (("data.csv", data_rows), ("line_lengths.csv", line_length_rows)):
        write_rows(Path(out) / file, [row for data in measured for row in rows_of(data)])


def read_statistics(out: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of data.csv and line_lengths.csv in `out`; raises InputError without them."""
    try:
        return read_rows(Path(out) / "data.csv"), read_rows(Path(out) / "line_lengths.csv")
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} does not exist; it is stored in a checkout of the project, or write "
            "it with crt_lib.text.stats.write_statistics, which needs WikiText-2"
        ) from error
