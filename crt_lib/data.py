"""Batches: packed windows and padded lines for training, and every token once for evaluation.

A batch is a pure function of (seed, epoch, step), so that resuming needs only the counters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.files import InputError

if TYPE_CHECKING:
    from crt_lib.text.tokenizer import TokenizedCorpus

NOT_SCORED = -100  # what torch's cross-entropy ignores
LONGEST = 1 << 20  # positions of a window, and rows of a batch
MIN_LINE = 50  # characters; a line must be longer to be kept by the released protocol


@dataclass(frozen=True)
class Batch:
    """Token ids and, position by position, the token that follows."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, NOT_SCORED where nothing is scored


class _Epochs:
    """What training batches share: the rows of an epoch in a random order, a batch at a time."""

    steps_per_epoch: int
    _draw: Callable[[int], np.ndarray]  # what to take in an epoch, in which order
    _rows: Callable[[np.ndarray], Batch]

    def __init__(self, seq_len: int, batch_size: int, seed: int):
        check_counts(1, LONGEST, seq_len=seq_len, batch_size=batch_size)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self._order = lru_cache(maxsize=1)(self._draw)

    def batch(self, epoch: int, step: int) -> Batch:
        """Batch `step` of `epoch`, (batch_size, seq_len)."""
        if not 0 <= step < self.steps_per_epoch:
            last = self.steps_per_epoch - 1
            raise InputError(f"step {step} is outside 0..{last}, the steps of an epoch")
        order = self._order(epoch)
        return self._rows(order[step * self.batch_size : (step + 1) * self.batch_size])


class PackedWindows(_Epochs):
    """Training batches of the honest protocol: windows cut from one stream, no padding.

    The stream is `eot_id` followed by `ids`. In an epoch the windows tile it from a random offset
    in [0, seq_len), in a random order; no token is a target twice. The tokens before the offset
    and the last few windows, too few for a batch, are left out of that epoch.
    Raises InputError when the stream is too short for one batch.
    """

    def __init__(self, ids: np.ndarray, seq_len: int, batch_size: int, seed: int, eot_id: int):
        super().__init__(seq_len, batch_size, seed)
        self._stream = np.concatenate([[eot_id], ids]).astype(np.int32)
        # from the largest offset, so that every epoch has the same number of steps
        self.steps_per_epoch = (len(ids) - (seq_len - 1)) // seq_len // batch_size
        if self.steps_per_epoch < 1:
            needed = (batch_size + 1) * seq_len - 1
            raise InputError(
                f"the corpus has {len(ids):,} tokens, too few for one batch of {batch_size} x "
                f"{seq_len}; it needs {needed:,}: give more text, or a smaller batch or window"
            )

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.seq_len))
        windows = (len(self._stream) - 1 - offset) // self.seq_len
        return offset + rng.permutation(windows) * self.seq_len

    def _rows(self, starts: np.ndarray) -> Batch:
        return _shifted(self._stream[starts[:, None] + np.arange(self.seq_len + 1)])


class PaddedLines(_Epochs):
    """Training batches of the released protocol: a line a row, cut or padded to `seq_len`.

    Inputs are the whole row; targets are the row shifted left, the last one not scored. Padding is
    `eot_id`, and it is scored as in the released script.
    Raises InputError when there are fewer lines than rows of a batch.
    """

    def __init__(
        self, lines: Sequence[np.ndarray], seq_len: int, batch_size: int, seed: int, eot_id: int
    ):
        super().__init__(seq_len, batch_size, seed)
        self._lines, self.eot_id = lines, eot_id
        self.steps_per_epoch = len(lines) // batch_size
        if self.steps_per_epoch < 1:
            raise InputError(
                f"the corpus has {len(lines)} lines longer than {MIN_LINE} characters, too few for "
                f"one batch of {batch_size}; give more text or a smaller batch"
            )

    @property
    def padding_share(self) -> float:
        """Share of all positions that hold padding."""
        real = sum(min(len(line), self.seq_len) for line in self._lines)
        return 1 - real / (len(self._lines) * self.seq_len)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self._lines))

    def _rows(self, chosen: np.ndarray) -> Batch:
        lines = [self._lines[i] for i in chosen]
        return _padded(lines, self.seq_len, self.eot_id, score_padding=True)


def evaluation_windows(
    ids: np.ndarray, seq_len: int, batch_size: int, eot_id: int, stride: int | None = None
) -> Iterator[Batch]:
    """Windows in which every token of `ids` is a scored target exactly once.

    The context of the first token is `eot_id`. A window begins `stride` tokens (default: seq_len)
    after the one before it; with a smaller stride windows overlap, and after the first only the
    last `stride` targets are scored, each with at least seq_len - stride tokens of context.
    The last window, where it is shorter, is a batch of its own shape: nothing is padded.
    Raises InputError unless 1 <= stride <= seq_len.
    """
    check_counts(1, LONGEST, seq_len=seq_len, batch_size=batch_size)
    stride = seq_len if stride is None else stride
    check_counts(1, seq_len, stride=stride)
    stream = np.concatenate([[eot_id], ids]).astype(np.int32)
    n_full = (len(ids) - seq_len) // stride + 1 if len(ids) >= seq_len else 0
    for first in range(0, n_full, batch_size):
        starts = np.arange(first, min(first + batch_size, n_full)) * stride
        batch = _shifted(stream[starts[:, None] + np.arange(seq_len + 1)])
        batch.targets[torch.from_numpy(starts > 0), : seq_len - stride] = NOT_SCORED
        yield batch
    scored = (n_full - 1) * stride + seq_len if n_full else 0
    if scored < len(ids):
        start = n_full * stride
        batch = _shifted(stream[None, start:])
        batch.targets[:, : scored - start] = NOT_SCORED
        yield batch


def evaluation_lines(
    lines: Sequence[np.ndarray],
    seq_len: int,
    batch_size: int,
    eot_id: int,
    score_padding: bool = True,
) -> Iterator[Batch]:
    """Every line once and in order, as rows of `PaddedLines`; the last batch may be smaller."""
    check_counts(1, LONGEST, seq_len=seq_len, batch_size=batch_size)
    for first in range(0, len(lines), batch_size):
        yield _padded(lines[first : first + batch_size], seq_len, eot_id, score_padding)


def _shifted(rows: np.ndarray) -> Batch:
    tokens = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone())  # a row of one would be a view


def _padded(lines: Sequence[np.ndarray], seq_len: int, eot_id: int, score_padding: bool) -> Batch:
    inputs = torch.full((len(lines), seq_len), eot_id, dtype=torch.int64)
    targets = torch.full_like(inputs, NOT_SCORED)
    for row, line in enumerate(lines):
        n = min(len(line), seq_len)
        inputs[row, :n] = torch.from_numpy(np.asarray(line[:n], dtype=np.int64))
        scored = seq_len if score_padding else n
        targets[row, : max(scored - 1, 0)] = inputs[row, 1:scored]
    return Batch(inputs, targets)


def check_counts(least: int, most: int, **counts: object) -> None:
    """Raise InputError for one of `counts` that is no whole number from `least` to `most`."""
    for name, count in counts.items():
        if not isinstance(count, int | np.integer) or not least <= count <= most:
            raise InputError(f"{name} is {count!r}; give a whole number from {least} to {most}")


def check_ids(ids: Tensor, config: ModelConfig) -> None:
    """Raise InputError unless `ids` are integers (B, T) that a model of `config` can read."""
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"token ids are {ids.dtype} {tuple(ids.shape)}; give integers (B, T)")
    if ids.shape[1] > config.max_seq_len:
        most = f"max_seq_len is {config.max_seq_len}; shorten it, or build a longer model"
        raise InputError(f"the sequence has {ids.shape[1]} tokens, {most}")
    _check_range(ids, "token id", config)


def check_targets(targets: Tensor, ids: Tensor, config: ModelConfig) -> None:
    """Raise InputError unless `targets` are of the ids' shape (B, T), and in the vocabulary."""
    if targets.dtype != torch.int64 or targets.shape != ids.shape:
        given = f"{targets.dtype} {tuple(targets.shape)}"
        raise InputError(f"targets are {given}; give torch.int64 of the ids' {tuple(ids.shape)}")
    _check_range(targets.masked_fill(targets == NOT_SCORED, 0), "target", config)


def _check_range(ids: Tensor, what: str, config: ModelConfig) -> None:
    # a GPU would be waited for, a graph being made has no values; their kernels assert instead
    if ids.numel() and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"{what} {low if low < 0 else high} is outside the vocabulary "
                f"0..{config.vocab_size - 1}; use the tokenizer the model was made for"
            )


def make_batches(config: TrainConfig, data: "TokenizedCorpus") -> PackedWindows | PaddedLines:
    """The training batches of `config.batching`; raises InputError when `data` is too small."""
    eot = data.tokenizer.eot_id
    if config.batching == "padded":
        return PaddedLines(data.train.lines, config.seq_len, config.batch_size, config.seed, eot)
    return PackedWindows(data.train.ids, config.seq_len, config.batch_size, config.seed, eot)


def updates_planned(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer updates of a run: `config.updates`, or what `config.epochs` come to."""
    if config.updates is not None:
        return config.updates
    return max(1, math.floor(config.epochs * steps_per_epoch / config.grad_accum))
