"""Losses by document, and intervals of their differences by a paired bootstrap over documents."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from crt_lib.config import LanguageModel
from crt_lib.data import NOT_SCORED, evaluation_lines, evaluation_windows
from crt_lib.evaluate import RELEASED_SEQ_LEN, Model, losses_of
from crt_lib.files import InputError
from crt_lib.text.corpus import released_lines
from crt_lib.text.tokenizer import TokenizedCorpus


@dataclass(frozen=True)
class Documents:
    """What a model's exits lose on each document of a split."""

    bytes: np.ndarray  # (documents,) UTF-8 bytes
    tokens: np.ndarray  # (documents,)
    nll: dict[int, np.ndarray]  # exit loop -> (documents,) nats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def score_documents(
    model: Model,
    data: TokenizedCorpus,
    split: str,
    seq_len: int,
    protocol: str = "honest",
    *,
    max_lines: int | None = None,
) -> Documents:
    """Score `split` as the honest or the released protocol does, and sum by document.

    A token belongs to the document in which it ends, or to its window (`document_of_tokens`);
    padding, to that of its line. `max_lines`: only the first so many lines (released), and the
    documents that they are of. Raises InputError for a text without lines (released).
    """
    part, eot = data.split(split), data.tokenizer.eot_id
    if protocol == "released":
        texts = data.corpus.documents(split)
        sizes = np.array([len(text.encode()) for text in texts])
        owner = np.repeat(np.arange(len(texts)), [len(released_lines(text)) for text in texts])
        if not part.lines:
            raise InputError(f"split {split} has no line over 50 characters to score")
        owner = np.repeat(owner[:max_lines], seq_len - 1)  # the last position has no next token
        sizes = sizes[: owner[-1] + 1]
        batches = evaluation_lines(part.lines[:max_lines], seq_len, 8, eot)
    else:
        owner, sizes = document_of_tokens(data, split, seq_len)
        batches = evaluation_windows(part.ids, seq_len, 8, eot, None)
    count, begin = len(sizes), 0
    nll: dict[int, np.ndarray] = {}
    tokens = np.zeros(count, np.int64)
    # summed batch by batch: what is kept of each lies between the next ones' logits on the heap
    for by_exit, targets in losses_of(model, batches):
        scored = targets != NOT_SCORED
        of = owner[begin : begin + int(scored.sum())]
        begin += len(of)
        tokens += np.bincount(of, minlength=count)
        for loop, loss in by_exit.items():
            sums = np.bincount(of, loss[scored].double().cpu().numpy(), count)
            nll[loop] = nll.get(loop, 0.0) + sums
    return Documents(bytes=sizes, tokens=tokens, nll=nll)


def document_of_tokens(
    data: TokenizedCorpus, split: str, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The index of each token's document (tokens,), and the documents' UTF-8 bytes.

    For a tokenizer that does not keep every byte of the text, windows of so many tokens and no
    bytes stand for documents; raises InputError without `window`.
    """
    sizes = np.array([len(text.encode()) for text in data.corpus.documents(split)])
    ends = np.cumsum(data.tokenizer.byte_lengths(data.split(split).ids))
    if ends[-1] == sizes.sum():
        return np.searchsorted(np.cumsum(sizes), ends), sizes
    if window is None:
        raise InputError(
            f"tokenizer {data.tokenizer.name} does not keep the text's bytes, so tokens cannot be "
            "given to documents; choose 'gpt2' or 'bpe:<vocabulary size>'"
        )
    owner = np.arange(len(ends)) // window
    return owner, np.zeros(owner[-1] + 1)


def difference_in_bits(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    sizes: np.ndarray,
    samples: int = 10_000,
) -> Interval:
    """Bits per byte of `ours` minus `theirs`: below zero, ours is better.

    Each is one array of nats by document for each of two or more seeds, `sizes` the documents'
    bytes. The interval adds two errors: of the documents, the same for both sides, resampled; and
    of the seeds, Student's t (Welch's). Raises InputError for a single seed.
    """
    if min(len(ours), len(theirs)) < 2:
        raise InputError("an interval over seeds needs two or more of each side")
    rng = np.random.default_rng(0)
    a, b = np.stack(ours) / math.log(2), np.stack(theirs) / math.log(2)  # (seeds, documents)
    by_document = a.mean(0) - b.mean(0)
    docs = rng.integers(len(sizes), size=(samples, len(sizes)))
    drawn = by_document[docs].sum(1) / sizes[docs].sum(1)
    parts = [(side.sum(1) / sizes.sum()).var(ddof=1) / len(side) for side in (a, b)]
    if sum(parts) > 0:
        freedom = sum(parts) ** 2 / sum(
            part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True)
        )
        drawn += math.sqrt(sum(parts)) * rng.standard_t(freedom, samples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(by_document.sum() / sizes.sum()), float(low), float(high))


def resampled(sums: np.ndarray, weights: np.ndarray, samples: int = 10_000) -> list[Interval]:
    """The mean of each column of `sums` (documents, K) over their `weights` (documents,), such as
    tokens, with its interval: documents are resampled with replacement.
    """
    rng = np.random.default_rng(0)
    count = len(weights)
    times = rng.multinomial(count, np.full(count, 1 / count), size=samples)  # (samples, documents)
    times = times[times @ weights > 0]  # a draw of documents without tokens says nothing
    drawn = (times @ sums) / (times @ weights)[:, None]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    means = sums.sum(0) / weights.sum()
    return [Interval(*map(float, row)) for row in zip(means, low, high, strict=True)]


def by_document(document: np.ndarray, values: np.ndarray) -> list[Interval]:
    """As `resampled`, of `values` (N, K) of tokens that are of `document` (N,)."""
    count = int(document.max()) + 1
    sums = np.stack([np.bincount(document, column, count) for column in values.T], axis=1)
    return resampled(sums, np.bincount(document, minlength=count))


def exit_table(
    model: LanguageModel, data: TokenizedCorpus, seq_len: int, max_lines: int | None = None
) -> list[dict[str, Any]]:
    """The paper's Table 2: a row a protocol and exit, nats a position on valid.

    `low` and `high`: the 95 % interval over documents; `minus_last` and its interval: how much more
    than the last exit it loses, document by document. Without lines over 50 characters there are
    no rows of the released protocol. `max_lines`: as for `score_documents`.
    """
    rows: list[dict[str, Any]] = []
    names = ("loss", "low", "high", "minus_last", "minus_low", "minus_high")
    lengths = {"honest": seq_len, "released": min(RELEASED_SEQ_LEN, model.config.max_seq_len)}
    for protocol, length in lengths.items():
        if protocol == "released" and not data.valid.lines:
            continue
        scored = score_documents(model, data, "valid", length, protocol, max_lines=max_lines)
        sums = np.stack([*scored.nll.values()], axis=1)
        both = resampled(np.hstack([sums, sums - sums[:, -1:]]), scored.tokens)
        for loop, loss, more in zip(scored.nll, both, both[len(scored.nll) :], strict=False):
            row: dict[str, Any] = {"protocol": protocol, "exit": loop, "seq_len": length}
            rows.append(row | dict(zip(names, astuple(loss) + astuple(more), strict=True)))
    return rows


def compare_arms(
    rows: Sequence[Mapping[str, Any]], ours: str, arms: Iterable[str], budget: str
) -> list[dict[str, Any]]:
    """A row for `ours` and each other arm: bits per byte, and ours minus theirs with its interval.

    `rows`: those that a search keeps, a row a training and document. Arms without rows for `budget`
    are left out; with a single seed on either side there is no interval. Raises InputError for an
    arm of several learning rates or other documents, and when `ours` has no rows.
    """
    import pandas as pd

    columns = ["arm", "budget", "seed", "max_lr", "document", "bytes", "nll"]
    frame = pd.DataFrame(rows, columns=columns)
    table: list[dict[str, Any]] = []
    for arm in (ours, *arms):
        own = frame[(frame["arm"] == arm) & (frame["budget"] == budget)]
        if own["max_lr"].nunique() > 1:
            raise InputError(f"arm {arm} has documents at several learning rates; keep one")
        if own.empty and arm == ours:
            raise InputError(f"no documents of {ours} for {budget}; `crt search --documents`")
        if own.empty:
            continue
        by_seed = own.pivot(index="seed", columns="document")  # seeds and documents in order
        losses, lengths = (np.array(by_seed[name]) for name in ("nll", "bytes"))
        if arm == ours:
            sizes, first = lengths[0], losses
        if not np.array_equal(lengths, np.tile(sizes, (len(losses), 1))):
            raise InputError(f"arm {arm} was scored on other documents than {ours}")
        bits = losses.sum(1) / sizes.sum() / math.log(2)
        row = {"arm": arm, "seeds": len(losses), "bits_per_byte": float(bits.mean())}
        if table:
            row["ours_minus"] = table[0]["bits_per_byte"] - row["bits_per_byte"]
        if table and min(len(losses), len(first)) > 1:
            interval = difference_in_bits([*first], [*losses], sizes)
            row |= {"low": interval.low, "high": interval.high}
        table.append(row)
    return table
