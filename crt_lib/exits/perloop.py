"""What each loop does: losses with intervals, changed guesses, a logit lens, depths never trained.

Table 2 and Figures 2 and 3 of the paper, and what explains them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.compare import Interval, by_document
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Outcome, Trace, apply_policy
from crt_lib.files import InputError
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT
from crt_lib.text.tokenizer import Tokenizer


def exit_losses(trace: Trace) -> list[dict[str, Any]]:
    """A row an exit: its loss (nats a token), and by how much it is below the exit before, each an
    `Interval` over documents; the share of tokens that its best guess gets right.
    """
    steps = np.diff(trace.loss, axis=1, prepend=trace.loss[:, :1])
    losses, gains = by_document(trace.document, trace.loss), by_document(trace.document, -steps)
    return [
        {
            "exit": loop,
            "loss": losses[i],
            "takes_off": gains[i] if i else None,
            "right": float(trace.right[:, i].mean()),
        }
        for i, loop in enumerate(trace.loops)
    ]


def loss_above_full(trace: Trace, outcome: Outcome) -> Interval:
    """Nats a token that a policy loses against full depth, with its interval over documents."""
    return above_full(trace, np.take_along_axis(trace.loss, outcome.exit[:, None], 1)[:, 0])


def above_full(trace: Trace, losses: np.ndarray) -> Interval:
    """As `loss_above_full`, for the losses (N,) of the trace's tokens however they came about."""
    (interval,) = by_document(trace.document, (losses - trace.loss[:, -1])[:, None])
    return interval


def changed_guesses(trace: Trace) -> list[dict[str, Any]]:
    """A row an exit after the first: shares of the tokens whose best guess the loops since the
    exit before changed, changed to the right token, and changed from it.
    """
    rows = []
    for i in range(1, len(trace.loops)):
        before, after = trace.right[:, i - 1], trace.right[:, i]
        rows.append(
            {
                "exit": trace.loops[i],
                "changed": float(trace.changed[:, i - 1].mean()),
                "to right": float((~before & after).mean()),
                "from right": float((before & ~after).mean()),
            }
        )
    return rows


def frontier(trace: Trace, criterion: str, points: int = 41) -> list[dict[str, float]]:
    """A row a constant threshold, from quantiles of the scores: tau, loss and cost of the policy.

    Raises InputError for an unknown criterion.
    """
    if criterion not in trace.scores:
        raise InputError(f"criterion {criterion!r} is not one of {', '.join(trace.scores)}")
    taus = np.unique(np.quantile(trace.scores[criterion], np.linspace(0, 1, points)).clip(0, 1))
    rows = []
    for tau in taus.tolist():
        outcome = apply_policy(trace, Policy(criterion, tau, tau, 1.0))
        rows.append(
            {
                "tau": tau,
                "loss": outcome.loss,
                "mean_loops": outcome.mean_loops,
                "multiply_adds": outcome.multiply_adds,
            }
        )
    return rows


def states_past_training(model: CRT, ids: Tensor, n_loops: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (loop, z) for loops 1..`n_loops`, which may be more than the model was trained with.

    Loops past the last have its encoding.
    """
    z, embedded = model.begin(ids)
    for loop in range(1, n_loops + 1):
        z = model.apply_loop(min(loop, model.config.n_loops), z, embedded)
        yield loop, z


def nearest_head(model: CRT, loop: int) -> int:
    """The loop of the head that reads the state after `loop`: its own, else the next, or last."""
    return next((own for own in model.config.head_loops if own >= loop), model.config.n_loops)


@torch.inference_mode()
def depth_sweep(
    model: CRT, ids: np.ndarray, eot_id: int, *, seq_len: int, n_loops: int = 16
) -> list[dict[str, Any]]:
    """A row a number of loops 1..`n_loops`: loss (nats a token), and how far the state moved.

    `trained`: 1 where a head was trained on that number of loops, else 0. `cosine` and `kl` compare
    the loop with the one before: the cosine of the states, and KL(this || before) in nats where
    both are read by the same head. Honest windows of `ids`.
    """
    sums = {name: np.zeros(n_loops) for name in ("loss", "cosine", "kl")}
    tokens, device = 0, model.loop_encoding.device
    for batch in evaluation_windows(ids, seq_len, 8, eot_id):
        targets = batch.targets.to(device)
        scored = targets != NOT_SCORED
        tokens += int(scored.sum())
        before = None
        for loop, z in states_past_training(model, batch.inputs.to(device), n_loops):
            z = z[scored]  # (tokens, d)
            head = nearest_head(model, loop)
            log_p = _log_probabilities(model, head, z)
            sums["loss"][loop - 1] += F.nll_loss(log_p, targets[scored], reduction="sum").item()
            if before is not None:
                log_q = _log_probabilities(model, head, before)
                sums["kl"][loop - 1] += (log_p.exp() * (log_p - log_q)).sum().item()
                sums["cosine"][loop - 1] += F.cosine_similarity(z, before, dim=-1).sum().item()
            before = z
    return [
        {
            "loops": loop,
            "head": nearest_head(model, loop),
            "trained": int(loop in model.config.head_loops),
            "loss": float(sums["loss"][loop - 1] / tokens),
            "cosine": float(sums["cosine"][loop - 1] / tokens) if loop > 1 else None,
            "kl": float(sums["kl"][loop - 1] / tokens) if loop > 1 else None,
        }
        for loop in range(1, n_loops + 1)
    ]


def _log_probabilities(model: CRT, head: int, z: Tensor) -> Tensor:
    return at_least_float32(F.linear(*model.readout(head, z))).log_softmax(-1)


@dataclass(frozen=True)
class Lens:
    """The best guess after each loop at each position of a text."""

    tokens: list[str]  # (T,) what stands there
    guesses: list[list[str]]  # (loops, T) the best next token
    probabilities: np.ndarray  # (loops, T) of it
    losses: np.ndarray  # (loops, T) nats of the token that follows; nan at the last position


@torch.inference_mode()
def logit_lens(model: CRT, tokenizer: Tokenizer, text: str) -> Lens:
    """What each loop would say after each token of `text`, by the head nearest to it.

    The first position is the end-of-text token, from which the first token is guessed.
    """
    ids = [tokenizer.eot_id, *tokenizer.encode(text).tolist()]
    row = torch.tensor([ids], device=model.loop_encoding.device)
    guesses, probabilities, losses = [], [], []
    for loop, z in states_past_training(model, row, model.config.n_loops):
        log_p = _log_probabilities(model, nearest_head(model, loop), z)[0]  # (T, V)
        best = log_p.max(-1)
        guesses.append(_texts(tokenizer, best.indices.tolist()))
        probabilities.append(best.values.exp().cpu().numpy())
        following = log_p[:-1].gather(-1, row[0, 1:, None])[:, 0]
        losses.append(np.append(-following.cpu().numpy(), np.nan))
    return Lens(
        ["<start>", *_texts(tokenizer, ids[1:])], guesses, np.stack(probabilities), np.stack(losses)
    )


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]
