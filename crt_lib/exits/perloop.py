"""What each loop does: losses with intervals, changed guesses, a logit lens, untrained depths."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.compare import Interval, by_document
from crt_lib.exits.policy import Loop, Policy, divergence, full_pass, nearest_head
from crt_lib.exits.scoring import by_loop, by_token, guesses
from crt_lib.exits.trace import Trace, apply_policy
from crt_lib.model import CRT
from crt_lib.text.tokenizer import Tokenizer


def exit_losses(trace: Trace) -> list[dict[str, Any]]:
    """A row an exit: its loss (nats a token), and by how much it is below the exit before, each an
    `Interval` over documents; the share of tokens that its best guess gets right.
    """
    losses = by_document(trace.document, trace.loss)
    gains = [None, *by_document(trace.document, -np.diff(trace.loss, axis=1))]
    columns = zip(trace.loops, losses, gains, trace.right.mean(0).tolist(), strict=True)
    return [dict(zip(("exit", "loss", "takes_off", "right"), row, strict=True)) for row in columns]


def above_full(trace: Trace, losses: np.ndarray) -> Interval:
    """How far losses (N,) of the trace's tokens, in nats, are above full depth, by document."""
    (interval,) = by_document(trace.document, (losses - trace.loss[:, -1])[:, None])
    return interval


def changed_guesses(trace: Trace) -> list[dict[str, Any]]:
    """A row an exit after the first: shares of the tokens whose best guess the loops since the
    exit before changed, changed to the right token, and changed from it.
    """
    before, after = trace.right[:, :-1], trace.right[:, 1:]
    shares = (each.mean(0).tolist() for each in (trace.changed, ~before & after, before & ~after))
    names = ("exit", "changed", "to right", "from right")
    rows = zip(trace.loops[1:], *shares, strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def frontier(trace: Trace, criterion: str, points: int = 41) -> list[dict[str, float]]:
    """A row a constant threshold, from quantiles of the scores: tau, loss and cost of the policy.

    Raises InputError for a criterion that the trace has not.
    """
    rows = []
    for tau in trace.thresholds(criterion, points):
        outcome = apply_policy(trace, Policy(criterion, tau, tau, 1.0))
        names = ("loss", "mean_loops", "multiply_adds")
        rows.append({"tau": tau} | {name: getattr(outcome, name) for name in names})
    return rows


def depth_sweep(
    model: CRT, ids: np.ndarray, eot_id: int, *, seq_len: int, n_loops: int = 16
) -> list[dict[str, Any]]:
    """A row a number of loops 1..`n_loops`: loss (nats a token), and how far the state moved.

    `trained`: 1 where a head was trained on that number of loops, else 0. `cosine` and `kl` compare
    the loop with the one before: the cosine of the states, and KL(this || before) in nats where
    both are read by the same head. Honest windows of `ids`.
    """

    def measure(loop: Loop, targets: Tensor) -> dict[str, Tensor]:
        before = dataclasses.replace(loop, z=loop.z_before).log_probabilities
        return {
            "loss": loop.losses(targets),
            "cosine": F.cosine_similarity(loop.z, loop.z_before, dim=-1),
            "kl": divergence(loop.log_probabilities, before),
        }

    found = by_token(model, ids, eot_id, seq_len, measure, n_loops)
    means = {name: values.mean(0, dtype=np.float64) for name, values in found.items()}
    rows: list[dict[str, Any]] = []
    for i in range(n_loops):
        trained = int(i + 1 in model.config.head_loops)
        rows.append({"loops": i + 1, "head": nearest_head(model, i + 1), "trained": trained})
        rows[i] |= {name: float(mean[i]) for name, mean in means.items()}
    return [rows[0] | {"cosine": None, "kl": None}, *rows[1:]]


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
    found = by_loop(full_pass(model, row), row.roll(-1), guesses)  # (T, loops)
    losses = found["loss"].T
    losses[:, -1] = np.nan
    best = [[tokenizer.decode([i]) for i in own] for own in found["guess"].T.tolist()]
    tokens = ["<start>", *(tokenizer.decode([i]) for i in ids[1:])]
    return Lens(tokens, best, found["sure"].T, losses)
