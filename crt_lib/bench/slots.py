"""`crt bench slots`: what batching over depth could save, from measured costs, before it is built.

A shared block can run rows at different loops at once: a row that leaves early takes its next token
at the next tick, and no row waits for the deepest. What a tick costs is measured; the ticks are
simulated on the exits that a policy took. Nothing is added for asking, nor for gathering the rows'
memories, so the speeds are estimates, and what is built is likely slower.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Trace, apply_policy
from crt_lib.runs.machine import measured_on, wait

if TYPE_CHECKING:
    from crt_lib.model import CRT

WARM_UP, TIMED = 8, 40  # steps
Rows = list[dict[str, Any]]


@torch.inference_mode()
def measure_costs(model: "CRT", most: int, length: int = 128) -> np.ndarray:
    """Seconds of the embedding (and prelude), of a loop and of a head for 0 to `most` rows, (3, R).

    Medians for 1, 2, 4, ... `most` rows, after `length` positions, on the threads at hand; between
    those on a straight line.
    """
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    length = min(length, model.config.max_seq_len - WARM_UP - TIMED)
    parts = np.transpose([_costs(model, rows, length) for rows in counts])
    return np.stack([np.interp(range(most + 1), [0, *counts], [0, *part]) for part in parts])


def _costs(model: "CRT", rows: int, length: int) -> np.ndarray:
    memory = Memory(model.config, rows, length + WARM_UP + TIMED, model.loop_encoding)
    for layer in memory.layers:
        layer.length = length
    step, loops = Step(model, memory), model.config.n_loops
    device, found = model.loop_encoding.device, []

    def now() -> float:
        wait(device.type)
        return time.perf_counter()

    for _ in range(WARM_UP + TIMED):
        ids = torch.randint(model.config.vocab_size, (rows,), device=device)
        marks = [now()]
        z = step.begin(ids)
        marks.append(now())
        for number in range(1, loops + 1):
            z = step.loop(number, z)
        marks.append(now())
        features, vocabulary = step.readout(loops, z)
        vocabulary(features)
        marks.append(now())
        step.end(loops)
        found.append(np.diff(marks) / (1, loops, 1))
    return np.median(found[WARM_UP:], 0)


class Simulated(NamedTuple):
    """`seconds` a token of all rows' text, ticks a token of a row, and rows at work a tick."""

    seconds: float
    ticks: float
    occupancy: float


def simulate(loops: np.ndarray, costs: np.ndarray, together: int = 1) -> Simulated:
    """Ticks of the rows of `loops` (R, T), the exit loop of each token of each row.

    `costs` as `measure_costs`, for up to R rows.

    A row that has left waits until `together` rows wait, or nobody else is at work; then all that
    wait are read out and take their next token. `together` R is a batch that waits for its deepest.
    Until a row's text ends: then it is no longer counted.
    """
    (rows, length), (begin, loop, head) = loops.shape, costs
    at, left = np.zeros(rows, int), loops[:, 0].copy()  # the token in hand; loops to run for it
    seconds = begin[rows]
    ticks = work = 0
    while (at < length).all():
        active = left > 0
        seconds += loop[active.sum()]
        ticks, work = ticks + 1, work + int(active.sum())
        left[active] -= 1
        waiting = left == 0
        if waiting.sum() < min(together, rows) and not waiting.all():
            continue
        seconds += head[waiting.sum()]
        at[waiting] += 1
        if (at < length).all():
            seconds += begin[waiting.sum()]
            left[waiting] = loops[waiting, at[waiting]]
    found = (seconds / at.sum(), ticks * rows / at.sum(), work / ticks / rows)
    return Simulated(*map(float, found))


def bench_slots(model: "CRT", test: Trace, policies: Mapping[str, Policy], rows: int) -> Rows:
    """A row a policy and way of batching `rows` texts: simulated speed against full depth.

    A policy's exits are those of the trace `test`, whose tokens stand in for the rows' texts.
    `waiting`: every row waits for the deepest. `slots`: rows go on as soon as `together` of them
    have left, for the best of a few such numbers. Fixed exits leave together. `above`: nats a token
    above full depth.
    """
    costs, depth = measure_costs(model, rows), model.config.n_loops
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
