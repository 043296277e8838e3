"""Protocols that only an audit asks for: lines without their padding, and nothing after a token."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from crt_lib.data import NOT_SCORED, Batch, evaluation_lines
from crt_lib.evaluate import RELEASED_SEQ_LEN, Evaluation, Model, sum_losses
from crt_lib.files import InputError


def evaluate_lines(
    model: Model,
    lines: Sequence[np.ndarray],
    eot_id: int,
    *,
    score_padding: bool,
    seq_len: int = RELEASED_SEQ_LEN,
    batch_size: int = 8,
) -> Evaluation:
    """Score padded lines by sums over tokens, with or without the padding.

    The second column of the 2 x 2 table (symmetric or causal x padding scored or not).
    """
    rows = evaluation_lines(lines, seq_len, batch_size, eot_id, score_padding)
    total, tokens = sum_losses(model, rows)
    return Evaluation("lines", {loop: nll / tokens for loop, nll in total.items()}, tokens)


def evaluate_deployable(
    model: Model,
    ids: np.ndarray,
    eot_id: int,
    *,
    seq_len: int = 64,
    windows: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Score sampled windows a token at a time, each with nothing after it in the input.

    Position t of a window is predicted from a row that ends at t, so a model that looks ahead finds
    nothing there. A causal model gets the loss it has on the whole window. Costs about
    windows * seq_len**2 / 2 positions. Raises InputError when `ids` is shorter than a window.
    """
    if len(ids) <= seq_len:
        raise InputError(f"{len(ids)} tokens are fewer than a window of {seq_len} and its target")
    starts = np.random.default_rng(seed).integers(0, len(ids) - seq_len, windows)
    rows = torch.from_numpy(np.stack([ids[s : s + seq_len + 1] for s in starts]).astype(np.int64))

    def prefixes() -> Iterable[Batch]:
        for t in range(1, seq_len + 1):
            targets = torch.full((windows, t), NOT_SCORED)
            targets[:, -1] = rows[:, t]
            yield Batch(rows[:, :t], targets)

    total, tokens = sum_losses(model, prefixes())
    return Evaluation("deployable", {loop: nll / tokens for loop, nll in total.items()}, tokens)
