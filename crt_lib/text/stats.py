"""What a corpus and a tokenizer come to in numbers: counts, bytes a token, padding.

Counts only: the tables can be published where the text itself cannot.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crt_lib.data import PaddedLines
from crt_lib.evaluate import RELEASED_SEQ_LEN
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.text.corpus import SPLITS, Corpus, load_corpus, released_lines
from crt_lib.text.tokenizer import TokenizedCorpus, TokenSplit, load_tokenizer, tokenize

BIN = 16  # tokens; a bin of `line_length_rows`
MEASURED = ("gpt2", "bpe:8192", "word")  # tokenizers that a closed-vocabulary corpus can take


def data_rows(data: TokenizedCorpus) -> list[dict[str, Any]]:
    """A row a split: tokens, words, bytes, bytes a token; lines and padding of the released rows.

    `lines` are those longer than 50 characters, `kept_share` is their share of the characters,
    `padding_share` the share of padding when each is cut or padded to 384 tokens; None for a split
    without such a line. With the SHA-256 of the text and of its tokens.
    """
    records = data.record()["splits"]
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
            "kept_share": _kept_share(getattr(data.corpus, name).text),
            "text_sha256": records[name]["text_sha256"],
            "token_sha256": records[name]["token_sha256"],
        }
        for name, split in ((name, data.split(name)) for name in SPLITS)
    ]


def padding_share(split: TokenSplit, seq_len: int = RELEASED_SEQ_LEN) -> float | None:
    """Share of the positions of the split's rows that hold padding; None without a row."""
    if not split.lines:
        return None
    eot_id = split.tokenizer.eot_id
    return PaddedLines(split.lines, seq_len, batch_size=1, seed=0, eot_id=eot_id).padding_share


def _kept_share(text: str) -> float:
    return sum(map(len, released_lines(text))) / len(text)


def line_length_rows(data: TokenizedCorpus) -> list[dict[str, Any]]:
    """How many lines of train over 50 characters have `shortest`..`longest` tokens, in bins of 16.

    `tokens` are those of all these lines. What is longer than 384 tokens, the length at which the
    released script cuts, is one bin with `longest` None.
    """
    first = np.arange(1, RELEASED_SEQ_LEN + 2, BIN)
    lengths, bins = np.array([len(line) for line in data.train.lines], int), [*first, np.inf]
    counts, _ = np.histogram(lengths, bins)
    tokens, _ = np.histogram(lengths, bins, weights=lengths)
    longest = [*(first[1:] - 1).tolist(), None]
    names = {"corpus": data.corpus.name, "tokenizer": data.tokenizer.name, "split": "train"}
    columns = zip(first.tolist(), longest, counts.tolist(), tokens.tolist(), strict=True)
    return [
        names | {"shortest": shortest, "longest": last, "lines": count, "tokens": held}
        for shortest, last, count, held in columns
    ]


def kept_tokens(rows: Sequence[Mapping[str, Any]], seq_len: int) -> int:
    """Of `line_length_rows`: the tokens left where lines are cut at `seq_len`, an end of a bin.

    Raises InputError for another length.
    """
    ends = [row["longest"] for row in rows if row["longest"]]
    if seq_len not in ends:
        raise InputError(f"seq_len is {seq_len}; it must be one of {', '.join(map(str, ends))}")
    whole = ends.index(seq_len) + 1
    cut = seq_len * sum(row["lines"] for row in rows[whole:])
    return sum(row["tokens"] for row in rows[:whole]) + cut


def length_rows(corpus: Corpus) -> list[dict[str, Any]]:
    """How many documents of train have how many words, and how many of its lines how many
    characters: 50 bins each, that begin at `shortest`. The last also holds the longest hundredth.

    Blank lines are not counted.
    """
    lines = corpus.train.text.split("\n")
    all_lengths = {
        "words in a document": [len(text.split()) for text in corpus.documents("train")],
        "characters in a line": [len(line) for line in lines if line.strip()],
    }
    rows = []
    for what, lengths in all_lengths.items():
        counts, starts = np.histogram(np.minimum(lengths, np.percentile(lengths, 99)), 50)
        bins = zip(starts.tolist(), counts.tolist(), strict=False)
        rows += [{"of": what, "shortest": start, "count": count} for start, count in bins]
    return rows


def write_statistics(out: str | Path, tokenizers: Sequence[str] = MEASURED) -> None:
    """Measure WikiText-2: `out`/lengths.csv; with each tokenizer, data.csv and line_lengths.csv.

    Raises InputError when the corpus or a tokenizer cannot be had; nothing is written then.
    """
    text = load_corpus("wikitext-2")
    measured = [tokenize(text, load_tokenizer(name, text)) for name in tokenizers]
    for file, rows_of in (("data.csv", data_rows), ("line_lengths.csv", line_length_rows)):
        write_rows(Path(out) / file, [row for data in measured for row in rows_of(data)])
    write_rows(Path(out) / "lengths.csv", length_rows(text))


def read_statistics(out: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of data.csv and line_lengths.csv in `out`; raises InputError without them."""
    try:
        return read_rows(Path(out) / "data.csv"), read_rows(Path(out) / "line_lengths.csv")
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} does not exist; it is stored in a checkout of the project, or write "
            "it with crt_lib.text.stats.write_statistics, which needs WikiText-2"
        ) from error
