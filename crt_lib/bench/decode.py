"""`crt bench decode`: what exits, caches, speculation and 8 bits save in time, and lose."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from crt_lib.bench.bound import Reading
from crt_lib.bench.ways import (
    COMPILED,
    FULL,
    UNCACHED,
    Prompts,
    Way,
    asking,
    asks_of,
    in_turn,
    latencies,
    ratio,
    timed,
    warmed,
    ways_of,
)
from crt_lib.exits.policy import Policy
from crt_lib.exits.speculate import Speculated
from crt_lib.exits.trace import Outcome, Trace, apply_policy
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.runs.machine import measured_on

COLUMNS = (
    *("tau", "mean_loops", "multiply_adds", "token_ppl"),
    *("decoded_loops", "decoded_heads", "decoded_asks", "accepted"),
)
WARM_UP = 8  # tokens
OFTEN = 4  # readings of the weights, after each way of each batch
READINGS = ("reading the weights", "reading weights, keys and values")  # rows of the bounds


@dataclass(frozen=True)
class Pace:
    """Measured seconds a token: of each loop, vocabulary head and question to a criterion, and of
    all else.
    """

    fixed: float
    loop: float
    head: float
    ask: float = 0.0

    def tokens_per_second(self, outcome: Outcome) -> float:
        """Of a policy whose tokens run these loops and ask these heads."""
        spent = self.loop * outcome.mean_loops + self.head * outcome.heads
        return 1 / (self.fixed + spent + self.ask * outcome.asks)


def measured_pace(rows: Sequence[Mapping[str, Any]]) -> Pace:
    """The pace that fits rows of `bench_decode` best (least squares), one text at a time.

    Raises InputError when there are fewer than three cached ways with exits among them.
    """
    left_out = (*UNCACHED, *READINGS)
    cached = [row for row in rows if row["batch"] == 1 and row["way"] not in left_out]
    names = ("decoded_loops", "decoded_heads", "decoded_asks")
    fit = {  # a way that is the same as another was timed once
        (1.0, *(row[name] for name in names)): 1 / row["tokens_per_second"]
        for row in cached
        if row.get("decoded_loops") is not None
    }
    if len(fit) < 3:
        raise InputError("a pace needs three or more measured ways of decoding one text at a time")
    known, seconds = np.array(list(fit)), np.array(list(fit.values()))
    return Pace(*map(float, np.linalg.lstsq(known, seconds, rcond=None)[0]))


def bench_decode(
    model: CRT,
    prompts: Sequence[Sequence[int]],
    policies: Mapping[str, Policy],
    losses: Mapping[str, float],
    test: Trace,
    *,
    batch_size: int = 1,
    new_tokens: int = 128,
    uncached: bool = True,
    compiled: bool = True,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row a way of decoding (`ways_of`): speed, latency, share of the bound, cost, perplexity.

    Greedy; prompts of one length, `batch_size` at a time. `only`: the ways whose names hold one of
    these, and full depth. The ways take turns with each batch, with all threads and then with one
    (columns `..._1`); those without a cache write the first batch alone. Perplexities are those of
    `losses`, nats a token by policy; mean loops and multiply-adds are of the trace `test`.

    `ms`: the wait for one more token of every row; `first_ms`: for the first, the prompt included,
    which tokens/s leave out. `speedup`: full depth's seconds by the way's, of the `batches` that
    both wrote; from FEWEST batches on its 95 % interval over them, `low` to `high`.
    `bound_share`: of `ms`, what the way's products with weights take alone (`Reading`, the last two
    rows); `bound_share_all`: with keys and values too.
    """
    batches = _batches(prompts, batch_size)
    left_out = (*(() if uncached else UNCACHED), *(() if compiled else (COMPILED,)))
    ways = _chosen(ways_of(model, policies, batch_size), left_out, only or [""])
    first = {policies[name]: name for name in reversed(ways) if name in policies}
    timed_as = {name: first[policies[name]] if name in policies else name for name in ways}
    own_ways = {name: ways[name] for name in timed_as.values()}
    with torch.inference_mode():
        made, *measured = _measured(model, own_ways, batches, new_tokens)
    rows = []
    for name, own in timed_as.items():
        if own in made:  # it could be compiled
            cost = _cost(model, name, policies, losses, made[own], test)
            # in a batch that leaves by token, a row runs loops for other rows
            alone = name not in UNCACHED and (batch_size == 1 or not cost.get("decoded_asks"))
            columns = _suffixed([on.columns(own, cost if alone else {}) for on in measured])
            columns["batches"] = len(measured[0].waits[own])
            rows.append({"way": name} | cost | columns)
    for i, name in enumerate(READINGS):
        columns = _suffixed([on.bounds(model.config.n_loops)[i] for on in measured])
        rows.append({"way": name} | columns | {"batches": len(batches)})
    row = {"way": "", "batch": batch_size, "texts": len(prompts)}
    row |= {"prompt_tokens": len(prompts[0]), "new_tokens": new_tokens} | dict.fromkeys(COLUMNS)
    where = {"precision": str(model.loop_encoding.dtype).removeprefix("torch.")} | measured_on()
    return [row | own | where for own in rows]


def _batches(prompts: Prompts, size: int) -> list[Prompts]:
    if not prompts or len(prompts) % size:
        raise InputError(f"{len(prompts)} prompts are not whole batches of {size}")
    return [prompts[start:][:size] for start in range(0, len(prompts), size)]


def _chosen(ways: dict[str, Way], left_out: Sequence[str], only: Sequence[str]) -> dict[str, Way]:
    ways = {name: way for name, way in ways.items() if not name.endswith(tuple(left_out))}
    chosen = {name: way for name, way in ways.items() if any(text in name for text in only)}
    if not chosen:
        raise InputError(
            f"no way of decoding has {' or '.join(map(repr, only))} in its name; they are "
            f"{', '.join(ways)}"
        )
    return {FULL: ways[FULL]} | chosen


def _cost(
    model: CRT,
    name: str,
    policies: Mapping[str, Policy],
    losses: Mapping[str, float],
    made: Sequence[Any],
    test: Trace,
) -> dict[str, Any]:
    """COLUMNS of a way: of what it made, and for a policy what `test` and `losses` say of it."""
    if isinstance(made[0], Speculated):
        drafted = sum(one.drafted for one in made)
        return {"accepted": sum(one.accepted for one in made) / max(drafted, 1)}
    policy = {**policies, **asking(model), "no cache": policies[FULL]}.get(name)
    if policy is None:
        return {}
    known = name if name in policies else FULL  # what a text is worth, asked or not, cached or not
    outcome = apply_policy(test, policies[known])
    loops = [loop for one in made for loop in one.loops]
    heads, asks = asks_of(model, policy, loops)
    return {
        "tau": policies[known].tau0 if policies[known].criterion else None,
        "mean_loops": outcome.mean_loops,
        "multiply_adds": outcome.multiply_adds,
        "token_ppl": math.exp(losses[known]),
        "decoded_loops": float(np.mean(loops)),
        "decoded_heads": heads,
        "decoded_asks": asks,
    }


@dataclass(frozen=True)
class _Measured:
    """On some number of threads: seconds of each way and of the readings."""

    rows: int  # of a batch
    waits: dict[str, list[np.ndarray]]  # of each batch, (new tokens,)
    read: list[np.ndarray]

    def columns(self, name: str, reads: Mapping[str, Any]) -> dict[str, float]:
        """Of a way; `reads` has the loops and heads that a token's weights are of, if known."""
        if name not in self.waits:
            return {}
        waits, seconds = np.stack(self.waits[name]), self._seconds(name)
        columns = {"tokens_per_second": self.rows / seconds.mean()} | latencies(waits)
        against = ratio(self._seconds(FULL)[: len(seconds)], seconds)
        columns |= dict(zip(("speedup", "low", "high"), against, strict=False))
        if loops := reads.get("decoded_loops"):
            least = self.least_ms(loops, reads["decoded_heads"]) / columns["ms"]
            columns |= dict(zip(("bound_share", "bound_share_all"), least, strict=True))
        return {column: float(value) for column, value in columns.items()}

    def _seconds(self, name: str) -> np.ndarray:
        """A step's, of each batch, first tokens apart."""
        return np.nanmean(np.stack(self.waits[name])[:, 1:], 1)

    def bounds(self, loops: int) -> list[dict[str, float]]:
        """Of the readings at full depth: the tokens/s that they allow, milliseconds a step."""
        least = self.least_ms(loops, 1).tolist()
        return [{"tokens_per_second": 1e3 * self.rows / ms, "ms": ms} for ms in least]

    def least_ms(self, loops: float, heads: float) -> np.ndarray:
        """Milliseconds of the products, without and with keys and values, (2,)."""
        reads = [(1, loops, 0, heads), (1, loops, loops, heads)]
        return 1e3 * np.array(reads) @ np.median(self.read, 0)


def _measured(
    model: CRT, ways: dict[str, Way], batches: Sequence[Prompts], new_tokens: int
) -> tuple[Any, ...]:
    """What each way made, where it could be compiled; then `_Measured` for all threads and one."""
    if new_tokens < 3:  # a first verification gives two
        raise InputError(f"{new_tokens} tokens: at least 3 can be timed")
    made = warmed(ways, lambda way: timed(way, batches[0], min(WARM_UP, new_tokens))[0])
    rows, length = len(batches[0]), len(batches[0][0]) + new_tokens // 2  # the mean one
    reading = Reading(model, rows, length)
    found: list[_Measured] = []
    names, before = [*made], torch.get_num_threads()
    try:
        for threads in dict.fromkeys((before, 1)):
            torch.set_num_threads(threads)
            on = _Measured(rows, {}, [])
            turns = list(zip(batches, in_turn(names, len(batches)), strict=True))
            texts: dict[str, list[Any]] = {}
            for name in names:
                if name.endswith(COMPILED):  # anew for this length and these threads
                    timed(ways[name], batches[0], new_tokens)
            for batch, turn in tqdm(turns, f"{rows} at a time, {threads} threads", disable=None):
                for name in turn:
                    if name in UNCACHED and (found or name in on.waits):
                        continue
                    text, *of = timed(ways[name], batch, new_tokens)
                    texts.setdefault(name, []).extend(text)
                    on.waits.setdefault(name, []).append(_waits(*of))
                    on.read.extend(reading() for _ in range(OFTEN))
            made |= texts
            found.append(on)
    finally:
        torch.set_num_threads(before)
    return made, *found


def _suffixed(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of all threads, and those of one."""
    pairs = zip(("", "_1"), measured, strict=False)
    return {column + suffix: value for suffix, own in pairs for column, value in own.items()}


def _waits(seconds: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The seconds that each new token of a row was waited for.

    Tokens that come together share their wait; beside the first one they have none.
    """
    waits = np.repeat(seconds / tokens, tokens)
    waits[: tokens[0]] = np.nan
    waits[0] = seconds[0]
    return waits
