"""`crt bench slots`: what batching over depth could save, from measured costs, before it is built.

A shared block can run rows at different loops at once: a row that leaves early takes its next token
at the next tick, and no row waits for the deepest. What a tick costs is measured; the ticks are
simulated on the exits that a policy took. Nothing is added for gathering the rows' memories, so the
speeds are bounds: what is built is slower.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Trace, apply_policy
from crt_lib.runs.machine import measured_on

if TYPE_CHECKING:
    from crt_lib.model import CRT

WARM_UP, TIMED = 8, 40  # steps
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Costs:
    """Seconds of the embedding (and prelude), of a loop and of a head, by the number of rows."""

    counts: Sequence[int]  # ascending
    begin: Sequence[float]
    loop: Sequence[float]
    head: Sequence[float]

    def of(self, part: Sequence[float], rows: int) -> float:
        """Of so many rows, none for no row; between those measured on a straight line."""
        return float(np.interp(rows, [0, *self.counts], [0.0, *part]))


@torch.inference_mode()
def measure_costs(model: "CRT", most: int, length: int = 128) -> Costs:
    """Medians for 1, 2, 4, ... `most` rows, after `length` positions, on the threads at hand."""
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    parts: dict[str, list[float]] = {"begin": [], "loop": [], "head": []}
    for rows in counts:
        length = min(length, model.config.max_seq_len - WARM_UP - TIMED)
        memory = Memory(model.config, rows, length + WARM_UP + TIMED, model.loop_encoding)
        for layer in memory.layers:
            layer.length = length
        step, loops = Step(model, memory), model.config.n_loops
        found: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(WARM_UP + TIMED):
            marks = [time.perf_counter()]
            z = step.begin(torch.randint(model.config.vocab_size, (rows,)))
            marks.append(time.perf_counter())
            for number in range(1, loops + 1):
                z = step.loop(number, z)
            marks.append(time.perf_counter())
            features, vocabulary = step.readout(loops, z)
            vocabulary(features)
            marks.append(time.perf_counter())
            step.end(loops)
            for name, seconds in zip(parts, np.diff(marks) / (1, loops, 1), strict=True):
                found[name].append(seconds)
        for name, own in found.items():
            parts[name].append(float(np.median(own[WARM_UP:])))
    return Costs(counts, **parts)


@dataclass(frozen=True)
class Simulated:
    """`seconds` a token of all rows' text, ticks a token of a row, and rows at work a tick."""

    seconds: float
    ticks: float
    occupancy: float


def simulate(loops: np.ndarray, costs: Costs, together: int = 1) -> Simulated:
    """Ticks of the rows of `loops` (R, T), the exit loop of each token of each row.

    A row that has left waits until `together` rows wait, or nobody else is at work; then all that
    wait are read out and take their next token. `together` R is a batch that waits for its deepest.
    Until a row's text ends: then it is no longer counted.
    """
    rows, length = loops.shape
    at, left = np.zeros(rows, int), loops[:, 0].copy()  # the token in hand; loops to run for it
    seconds = costs.of(costs.begin, rows)
    ticks = work = 0
    while (at < length).all():
        active = left > 0
        seconds += costs.of(costs.loop, int(active.sum()))
        ticks, work = ticks + 1, work + int(active.sum())
        left[active] -= 1
        waiting = left == 0
        if waiting.sum() < min(together, rows) and not waiting.all():
            continue
        seconds += costs.of(costs.head, int(waiting.sum()))
        at[waiting] += 1
        if (at < length).all():
            seconds += costs.of(costs.begin, int(waiting.sum()))
            left[waiting] = loops[waiting, at[waiting]]
    return Simulated(seconds / at.sum(), ticks * rows / at.sum(), work / ticks / rows)


def bench_slots(
    model: "CRT", test: Trace, policies: Mapping[str, Policy], rows: int, costs: Costs | None = None
) -> Rows:
    """A row a policy and way of batching `rows` texts: simulated speed against full depth.

    A policy's exits are those of the trace `test`, whose tokens stand in for the rows' texts.
    `waiting`: every row waits for the deepest. `slots`: rows go on as soon as `together` of them
    have left, for the best of a few such numbers. Fixed exits leave together. `above`: nats a token
    above full depth. `costs`: those of `measure_costs`, measured here if they are not given.
    """
    costs, depth = costs or measure_costs(model, rows), model.config.n_loops
    length, found = len(test.loss) // rows, []
    full = simulate(np.full((rows, length), depth), costs, rows)
    whole = apply_policy(test, Policy()).loss
    for name, policy in policies.items():
        outcome = apply_policy(test, policy)
        loops = np.array(test.loops)[outcome.exit][: rows * length].reshape(rows, length)
        counts = {1, rows // 4, rows // 2, rows} - {0} if policy.asks else {rows}
        tried = {count: simulate(loops, costs, count) for count in sorted(counts)}
        best = min(tried, key=lambda count: tried[count].seconds)
        for way, count in {"waiting": rows, "slots": best}.items() if policy.asks else [("", rows)]:
            own = tried[count]
            row = {"policy": name, "way": way, "rows": rows, "above": outcome.loss - whole}
            row |= {"mean_loops": outcome.mean_loops, "together": count, "ticks": own.ticks}
            row |= {"occupancy": own.occupancy, "tokens_per_second": 1 / own.seconds}
            found.append(row | {"speedup": full.seconds / own.seconds} | measured_on())
    return found
