"""A trace in few bytes, for a page that computes policies itself.

Scores are kept in at most 256 levels an exit, losses in 65,536 steps.
"""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from crt_lib.exits.perloop import frontier
from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.exits.trace import Trace, apply_policy, oracle

LEVELS = 256
STEPS = 65_535


def some_tokens(trace: Trace, count: int) -> Trace:
    """`count` tokens of `trace`, evenly spaced; all, where it has no more.

    Their losses are shifted, by exit, so that every fixed exit loses what it does on all tokens.
    """
    total = len(trace.loss)
    if count >= total:
        return trace
    some = trace.some(np.arange(count) * total // count)
    return dataclasses.replace(some, loss=_with_mean_of(some.loss, trace.loss))


def _with_mean_of(loss: np.ndarray, other: np.ndarray) -> np.ndarray:
    return loss + (other.mean(0, dtype=np.float64) - loss.mean(0, dtype=np.float64))


def coarse(trace: Trace, exact: Sequence[Policy] = ()) -> Trace:
    """`trace` with what `pack` keeps of its losses and scores.

    Tokens exit under the policies `exact` as before, and lose the same in all. Under others a score
    may be taken for the middle one of its level, which holds a 256th of the tokens or a few more.
    """
    before, scores = trace.loops[:-1], {}
    for name, own in trace.scores.items():
        asked = [policy for policy in exact if policy.criterion == name]
        taus = [[policy.threshold(loop) for policy in asked] for loop in before]
        scores[name] = np.stack(list(map(_to_levels, own.T, taus)), axis=1)
    alike = np.lexsort([apply_policy(trace, policy).exit for policy in (*exact, Policy())])
    loss = _with_mean_of(_rounded(trace.loss, alike), trace.loss)
    return dataclasses.replace(trace, loss=loss, scores=scores)


def _rounded(loss: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Losses (N, E) in whole steps, up or down, so that sums over tokens next to each other in
    `order` stay as they were.
    """
    low, step, ends = *_grid(loss), np.arange(loss.shape[1])
    sums = np.rint(np.cumsum((loss[order] - low) / step, axis=0))
    steps = np.empty(loss.shape)
    steps[order] = np.diff(sums, axis=0, prepend=0).clip(0, STEPS)
    steps[loss.argmin(0), ends], steps[loss.argmax(0), ends] = 0, STEPS  # they tell the grid
    return low + step * steps


def _to_levels(scores: np.ndarray, taus: list[float]) -> np.ndarray:
    """Each of `scores` (N,) as the middle one of its level; a level begins at each of `taus`."""
    ordered = np.sort(scores)
    if len(np.unique(ordered)) <= LEVELS:
        return scores
    taus = sorted(set(taus))
    count = LEVELS - len(taus)
    begins = np.append(ordered[np.arange(count) * len(ordered) // count], taus)
    first = np.unique(np.searchsorted(ordered, begins.astype(scores.dtype)))
    first = first[first < len(ordered)]
    middle = (first + np.append(first[1:], len(ordered)) - 1) // 2
    return ordered[middle][np.searchsorted(ordered[first], scores, side="right") - 1]


def _grid(loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By exit (E,) the least loss, and the nats of a step above it."""
    low = loss.min(0).astype(np.float64)
    return low, np.maximum(loss.max(0) - low, 1e-9) / STEPS


def pack(trace: Trace) -> dict[str, Any]:
    """What a page needs of a trace that is `coarse` to judge policies; arrays in base64.

    `loss`: by exit, the least, nats of a step, and steps (N,) above it in 16 bits. `scores`: by
    criterion, what asking takes, and by exit the levels' scores (float32, ascending) and the level
    (N,) of each token: none where there is one level, a bit where there are two, else 8 bits.
    `oracle`: exits (N,).
    """
    low, step = _grid(trace.loss)
    steps = np.rint((trace.loss - low) / step).astype("<u2")
    columns = zip(low.tolist(), step.tolist(), steps.T, strict=True)
    without, head = trace.costs
    scores = {}
    for name, own in trace.scores.items():
        criterion = CRITERIA[name]
        scores[name] = {
            "heads": criterion.heads,
            "compares": criterion.compares,
            "exits": [_levels(exit_) for exit_ in own.T],
        }
    return {
        "tokens": len(trace.loss),
        "loops": trace.loops,
        "loss": [{"low": low, "step": step, "steps": text(steps)} for low, step, steps in columns],
        "scores": scores,
        "oracle": text(oracle(trace).exit.astype(np.uint8)),
        "costs": {"without": without.tolist(), "head": int(head)},
    }


def _levels(scores: np.ndarray) -> dict[str, str]:
    values, level = np.unique(scores.astype("<f4"), return_inverse=True)
    kept = level.astype(np.uint8) if len(values) > 2 else np.packbits(level)
    return {"values": text(values), "levels": text(kept if len(values) > 1 else kept[:0])}


def text(array: np.ndarray) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def largest_errors(trace: Trace, kept: Trace) -> dict[str, float]:
    """How far policies on `kept` come from those on `trace`, at most: of the perplexity as a share,
    and of the mean loops. Policies: 21 constant thresholds of every criterion.
    """
    ppl, loops = [], []
    for name in trace.scores:
        for row in frontier(trace, name, 21):
            outcome = apply_policy(kept, Policy(name, row["tau"], row["tau"], 1.0))
            ppl.append(abs(np.expm1(outcome.loss - row["loss"])))
            loops.append(abs(outcome.mean_loops - row["mean_loops"]))
    return {"ppl": float(max(ppl)), "loops": float(max(loops))}
