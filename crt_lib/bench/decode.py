"""`crt bench decode`: what exits, caches, speculation and 8 bits save in time, and lose."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from crt_lib.bench.ways import (
    COMPILED,
    FULL,
    UNCACHED,
    Prompts,
    Reading,
    Way,
    asking,
    asks_of,
    ways_of,
)
from crt_lib.exits.decode import Speculated
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Outcome, Trace, apply_policy
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.runs.machine import measured_on, wait

COLUMNS = (
    *("tau", "mean_loops", "multiply_adds", "token_ppl"),
    *("decoded_loops", "decoded_heads", "decoded_asks", "accepted"),
)
WARM_UP = 8  # tokens
READINGS = 16  # of the weights, after each way in each round
READING = "reading the weights"  # the row of the bound itself
READING_ALL = "reading weights, keys and values"


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
    left_out = (*UNCACHED, READING, READING_ALL)
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


@dataclass
class Timing:
    """Of one way and one number of threads: seconds to each text's first token, the seconds that
    later tokens were waited for, and the tokens/s of each round, the first tokens apart.
    """

    first: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens/s of the median round."""
        return float(np.median(self.rounds))

    def columns(self, suffix: str = "") -> dict[str, float]:
        """Tokens/s, and milliseconds a step."""
        low, middle, high = np.percentile(self.waits, (5, 50, 95)) * 1e3
        columns = {"tokens_per_second": self.speed, "ms": middle, "ms_p5": low, "ms_p95": high}
        columns["first_ms"] = float(np.median(self.first)) * 1e3
        return {f"{name}{suffix}": float(value) for name, value in columns.items()}


def bench_decode(
    model: CRT,
    prompts: Sequence[Sequence[int]],
    policies: Mapping[str, Policy],
    losses: Mapping[str, float],
    test: Trace,
    *,
    batch_size: int = 1,
    new_tokens: int = 128,
    rounds: int = 5,
    uncached: bool = True,
    compiled: bool = True,
    only: Sequence[str] = (),
    echo: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row a way of decoding: its speed and latency, share of the matvec bound, cost, perplexity.

    Ways: each of the named `policies`, "full depth" among them;
    full depth with a criterion asked at every exit that no token passes; with 8-bit weights; for a
    batch of one speculation from each exit; without a cache, and as the released code would, every
    head of every position; and an untrained GPT-2 of equal multiply-adds with transformers' growing
    cache, and with its static cache, compiled. `only`: the ways whose names hold one of these, and
    full depth. Perplexities are those of `losses`, nats a token by policy; mean loops and
    multiply-adds are of the trace `test`. Greedy; prompts of one length, `batch_size` of them at a
    time, one batch after the other.

    The ways take turns, `rounds` times, with all threads and then with one (columns `..._1`); those
    without a cache take one turn, of one batch. `ms` is the wait for one more token of every row,
    its median and 5th and 95th percentile, `first_ms` that for the first, the prompt included;
    tokens/s count from the first token on and are of the median round, `speedup` is the median of
    the ratios to full depth within a round. `bound_share`: the time that the way's products with
    weights take alone (`crt_lib.bench.ways.Reading`, between the ways), over `ms`;
    `bound_share_all`: with keys and values of the mean length read too; the last two rows are these
    readings. A policy that is equal to an earlier one is not timed again. `echo` is told how
    long it takes, and each figure as it comes.
    """
    prompts = [list(prompt) for prompt in prompts]
    if not prompts or len(prompts) % batch_size:
        raise InputError(f"{len(prompts)} prompts are not whole batches of {batch_size}")
    if new_tokens < 3 or rounds < 1:  # a first verification gives two
        raise InputError(f"{new_tokens} tokens in {rounds} rounds: at least 3 in 1 can be timed")
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    left_out = (() if uncached else UNCACHED) + (() if compiled else (COMPILED,))
    ways = _chosen(ways_of(model, policies, batch_size), left_out, only)
    same = _same(policies)
    timed = {name: way for name, way in ways.items() if same.get(name) not in ways}
    reading = Reading(model, batch_size, len(prompts[0]) + new_tokens // 2)
    bench = _Bench(timed, reading, batches, new_tokens, rounds, echo)
    with torch.inference_mode():
        bench.run()
    shape = {"batch": batch_size, "texts": len(prompts)}
    shape |= {"prompt_tokens": len(prompts[0]), "new_tokens": new_tokens}
    where = {"precision": str(model.loop_encoding.dtype).removeprefix("torch.")} | measured_on()
    rows = []
    for name in ways:
        key = name if name in bench.made else same.get(name)
        if key not in bench.made:
            continue  # what could not be compiled
        cost = _cost(model, name, policies, losses, bench.made[key], test)
        by_token = batch_size > 1 and cost["decoded_asks"]  # then a row runs loops for others
        products = None
        if cost["decoded_loops"] and name not in UNCACHED and not by_token:
            products = cost["decoded_loops"], cost["decoded_heads"]
        rows.append({"way": name} | shape | cost | bench.columns(key, products) | where)
    for name in (READING, READING_ALL):
        columns = bench.reading_columns(name, model.config.n_loops)
        rows.append({"way": name} | shape | dict.fromkeys(COLUMNS) | columns | where)
    return rows


def _same(policies: Mapping[str, Policy]) -> dict[str, str]:
    """Of each policy that is equal to an earlier one, the earlier one's name."""
    first: dict[Policy, str] = {}
    for name, policy in policies.items():
        first.setdefault(policy, name)
    return {name: first[policy] for name, policy in policies.items() if first[policy] != name}


def _chosen(ways: dict[str, Way], left_out: Sequence[str], only: Sequence[str]) -> dict[str, Way]:
    ways = {name: way for name, way in ways.items() if not name.endswith(tuple(left_out))}
    if not only:
        return ways
    chosen = [name for name in ways if any(text in name for text in only)]
    if not chosen:
        raise InputError(
            f"no way of decoding has {' or '.join(map(repr, only))} in its name; they are "
            f"{', '.join(ways)}"
        )
    return {name: way for name, way in ways.items() if name in (FULL, *chosen)}


def _cost(
    model: CRT,
    name: str,
    policies: Mapping[str, Policy],
    losses: Mapping[str, float],
    made: Sequence[Any],
    test: Trace,
) -> dict[str, Any]:
    """COLUMNS of a way: of what it made, and for a policy what `test` and `losses` say of it."""
    cost: dict[str, Any] = dict.fromkeys(COLUMNS)
    if isinstance(made[0], Speculated):
        cost["accepted"] = sum(one.accepted for one in made) / max(sum(o.drafted for o in made), 1)
    policy = {**policies, **asking(model), "no cache": policies[FULL]}.get(name)
    if policy is None:
        return cost
    known = name if name in policies else FULL  # what a text is worth, asked or not, cached or not
    outcome = apply_policy(test, policies[known])
    loops = [loop for one in made for loop in one.loops]
    heads, asks = asks_of(model, policy, loops)
    return cost | {
        "tau": policies[known].tau0 if policies[known].criterion else None,
        "mean_loops": outcome.mean_loops,
        "multiply_adds": outcome.multiply_adds,
        "token_ppl": math.exp(losses[known]),
        "decoded_loops": float(np.mean(loops)),
        "decoded_heads": heads,
        "decoded_asks": asks,
    }


class _Bench:
    """Times the ways in turn, with all threads and with one; each round begins with another way."""

    def __init__(
        self,
        ways: dict[str, Way],
        reading: Reading,
        batches: Sequence[Prompts],
        new_tokens: int,
        rounds: int,
        echo: Callable[[str], None] | None,
    ):
        self.ways, self.reading, self.batches = ways, reading, batches
        self.new_tokens, self.rounds, self.echo = new_tokens, rounds, echo or (lambda text: None)
        self.threads = list(dict.fromkeys((torch.get_num_threads(), 1)))
        self.suffixes = dict(zip(self.threads, ("", "_1"), strict=False))  # of columns
        self.times: dict[tuple[int, str], Timing] = {}
        self.read: dict[tuple[int, str], list[dict[str, float]]] = {}
        self.made: dict[str, list[Any]] = {}

    def run(self) -> None:
        """Warm up, say how long it takes, and measure."""
        self._warm_up()
        for threads in self.threads:
            with use_threads(threads):
                self._measure(threads)

    def columns(self, name: str, products: tuple[float, float] | None) -> dict[str, Any]:
        """Of a way; `products`: the loops and heads that its new tokens are multiplied with."""
        columns: dict[str, Any] = {}
        for threads, suffix in self.suffixes.items():
            own = self.times.get((threads, name))
            if own is None:
                continue
            full = self.times[threads, FULL].rounds[: len(own.rounds)]
            columns |= own.columns(suffix)
            columns[f"speedup{suffix}"] = float(np.median(np.array(own.rounds) / full))
            if products is not None:
                for reading, share in ((READING, "bound_share"), (READING_ALL, "bound_share_all")):
                    least = self._least(threads, reading, *products)
                    columns[share + suffix] = least * 1e3 / columns[f"ms{suffix}"]
        return columns | {"rounds": len(self.times[self.threads[0], name].rounds)}

    def reading_columns(self, name: str, n_loops: int) -> dict[str, Any]:
        """Of a reading at full depth: milliseconds a step, and the tokens/s that it allows."""
        columns: dict[str, Any] = {}
        for threads, suffix in self.suffixes.items():
            seconds = self._least(threads, name, n_loops, 1)
            columns[f"tokens_per_second{suffix}"] = len(self.batches[0]) / seconds
            columns[f"ms{suffix}"] = seconds * 1e3
        return columns | {"rounds": self.rounds}

    def _least(self, threads: int, reading: str, loops: float, heads: float) -> float:
        parts = self.read[threads, reading]
        part = {name: float(np.median([part[name] for part in parts])) for name in parts[0]}
        return part["embedding"] + loops * part["loop"] + heads * part["head"]

    def _warm_up(self) -> None:
        started, seconds, tokens = time.perf_counter(), 0.0, min(WARM_UP, self.new_tokens)
        for name in list(self.ways):
            try:
                for _ in range(2):
                    once = Timing()
                    self.ways[name](self.batches[0], tokens, _Clock(once, len(self.batches[0])))
            except InputError as error:
                self.echo(f"{name} is left out: {error}")
                del self.ways[name]
                continue
            a_batch = once.first[0] + (self.new_tokens - 1) * float(np.median(once.waits))
            times = 1 if name in UNCACHED else len(self.batches) * self.rounds * len(self.threads)
            seconds += a_batch * times
        took = time.perf_counter() - started
        self.echo(
            f"{len(self.batches[0])} at a time: {len(self.ways)} ways, {self.rounds} rounds, "
            f"{' and '.join(map(str, self.threads))} threads; warmed up in {took:.0f} s, about "
            f"{seconds:.0f} s to go"
        )

    def _measure(self, threads: int) -> None:
        names = list(self.ways)
        if threads != self.threads[0]:
            names = [name for name in names if name not in UNCACHED]
        for round_ in range(self.rounds):
            begin = round_ * len(names) // self.rounds
            for name in names[begin:] + names[:begin]:
                if name not in UNCACHED:
                    self._time(threads, name, self.batches)
                elif round_ == 0:
                    self._time(threads, name, self.batches[:1])
                for reading, everything in ((READING, False), (READING_ALL, True)):
                    found = self.read.setdefault((threads, reading), [])
                    found += [self.reading(everything) for _ in range(READINGS)]
            if round_ == 0:
                for name in names:
                    own = self.times[threads, name]
                    ms = own.columns()["ms"]
                    self.echo(f"  {threads} threads, {name}: {own.speed:.0f} tokens/s, {ms:.2f} ms")
            else:
                speed = self.times[threads, FULL].speed
                self.echo(f"  round {round_ + 1} of {self.rounds}: full depth {speed:.0f} tokens/s")

    def _time(self, threads: int, name: str, batches: Sequence[Prompts]) -> None:
        own = self.times.setdefault((threads, name), Timing())
        made, before = [], len(own.waits)
        for batch in batches:
            made += self.ways[name](batch, self.new_tokens, _Clock(own, len(batch)))
        waits = own.waits[before:]
        own.rounds.append(len(batches[0]) * len(waits) / sum(waits))
        self.made[name] = made


class _Clock:
    """Called with the new tokens of `rows` rows: writes down how long they were waited for.

    Tokens that come together share their wait.
    """

    def __init__(self, timing: Timing, rows: int):
        self.timing, self.rows = timing, rows
        self.last, self.begun = time.perf_counter(), False

    def __call__(self, tokens: list[int]) -> None:
        wait("cuda" if torch.cuda.is_available() else "cpu")
        now = time.perf_counter()
        if self.begun:
            steps = len(tokens) // self.rows
            self.timing.waits += [(now - self.last) / steps] * steps
        else:
            self.begun = True
            self.timing.first.append(now - self.last)
        self.last = now


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Compute with that many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
