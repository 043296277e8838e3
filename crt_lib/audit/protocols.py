"""What a score is made of: tokens with nothing after them, and padding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crt_lib.data import NOT_SCORED, Batch, evaluation_lines
from crt_lib.evaluate import Evaluation, Model, sum_losses
from crt_lib.files import InputError


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

    Position t of a window is predicted from a row that ends at t: a causal model gets the loss it
    has on the whole window. Raises InputError when `ids` is shorter than a window.
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


@dataclass(frozen=True)
class PaddingReport:
    """The same lines, three ways: nats a scored position by exit."""

    share: float  # of the scored positions that are padding
    scored: dict[int, float]  # rows of one length, the padding scored too
    ignored: dict[int, float]  # the padding is there but not scored
    absent: dict[int, float]  # each line in a row of its own length


def padding_report(
    model: Model, lines: Sequence[np.ndarray], eot_id: int, *, seq_len: int = 384
) -> PaddingReport:
    """What scoring padding does to the perplexity of `model` on tokenized `lines`.

    Lines are cut or padded to `seq_len` with `eot_id`, the next token scored at each position.
    Raises InputError when there is nothing to score.
    """
    ways: dict[str, Iterable[Batch]] = {
        "scored": evaluation_lines(lines, seq_len, 8, eot_id),
        "ignored": evaluation_lines(lines, seq_len, 8, eot_id, score_padding=False),
        "absent": (
            batch
            for line in lines
            if len(line) > 1  # else no token has one before it
            for batch in evaluation_lines([line], min(len(line), seq_len), 1, eot_id)
        ),
    }
    found, tokens = {}, {}
    for way, batches in ways.items():
        nll, tokens[way] = sum_losses(model, batches)
        found[way] = {loop: total / tokens[way] for loop, total in nll.items()}
    return PaddingReport(1 - tokens["ignored"] / tokens["scored"], **found)
