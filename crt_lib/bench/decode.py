"""`crt bench decode`: what exits, caches, speculation and 8 bits save in time, and lose."""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from crt_lib.bench.bound import Reading
from crt_lib.bench.ways import COMPILED, FULL, UNCACHED, Prompts, Way, asking, asks_of, ways_of
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
OFTEN = 16  # readings of the weights, after each way in each round
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
    rounds: int = 5,
    uncached: bool = True,
    compiled: bool = True,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row a way of decoding (`ways_of`): speed, latency, share of the bound, cost, perplexity.

    Greedy; prompts of one length, `batch_size` at a time. `only`: the ways whose names hold one of
    these, and full depth. The ways take turns, `rounds` times, with all threads and then with one
    (columns `..._1`); those without a cache take one turn, of one batch. Perplexities are those of
    `losses`, nats a token by policy; mean loops and multiply-adds are of the trace `test`.

    `ms`: the wait for one more token of every row; `first_ms`: for the first, the prompt included,
    which tokens/s leave out. `speedup`: the median over rounds of the ratio to full depth.
    `bound_share`: of `ms`, what the way's products with weights take alone (`Reading`, the last two
    rows); `bound_share_all`: with keys and values too.
    """
    if not prompts or len(prompts) % batch_size:
        raise InputError(f"{len(prompts)} prompts are not whole batches of {batch_size}")
    if new_tokens < 3 or rounds < 1:  # a first verification gives two
        raise InputError(f"{new_tokens} tokens in {rounds} rounds: at least 3 in 1 can be timed")
    left_out = (() if uncached else UNCACHED) + (() if compiled else (COMPILED,))
    ways = _chosen(ways_of(model, policies, batch_size), left_out, only or [""])
    first = {policies[name]: name for name in reversed(ways) if name in policies}
    timed_as = {name: first[policies[name]] if name in policies else name for name in ways}
    timed = {name: ways[name] for name in ways if timed_as[name] == name}
    bench = _Bench(model, timed, prompts, batch_size, new_tokens, rounds)
    with torch.inference_mode():
        bench.run()
    rows = []
    for name, own in timed_as.items():
        if own in bench.made:  # it could be compiled
            cost = _cost(model, name, policies, losses, bench.made[own], test)
            # in a batch that leaves by token, a row runs loops for other rows
            alone = name not in UNCACHED and (batch_size == 1 or not cost.get("decoded_asks"))
            rows.append({"way": name} | cost | bench.columns(own, cost if alone else {}))
    rows += bench.bounds()
    where = {"precision": str(model.loop_encoding.dtype).removeprefix("torch.")} | measured_on()
    shape = {"way": "", "batch": batch_size, "texts": len(prompts)}
    shape |= {"prompt_tokens": len(prompts[0]), "new_tokens": new_tokens}
    return [shape | dict.fromkeys(COLUMNS) | row | where for row in rows]


def _chosen(ways: dict[str, Way], left_out: Sequence[str], only: Sequence[str]) -> dict[str, Way]:
    ways = {name: way for name, way in ways.items() if not name.endswith(tuple(left_out))}
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


class _Bench:
    """Times the ways in turn, with all threads and with one."""

    def __init__(
        self,
        model: CRT,
        ways: dict[str, Way],
        prompts: Prompts,
        batch_size: int,
        new_tokens: int,
        rounds: int,
    ):
        starts = range(0, len(prompts), batch_size)
        self.batches = [prompts[start : start + batch_size] for start in starts]
        self.ways, self.new_tokens, self.rounds = ways, new_tokens, rounds
        self.batch_size, self.depth = batch_size, model.config.n_loops
        self.reading = Reading(model, batch_size, len(prompts[0]) + new_tokens // 2)  # the mean
        threads = dict.fromkeys((torch.get_num_threads(), 1))
        self.suffixes = dict(zip(threads, ("", "_1"), strict=False))  # of columns, by threads
        # of each way: rounds of (batches, new tokens), the seconds that each token was waited for
        self.times: dict[tuple[int, str], list[np.ndarray]] = defaultdict(list)
        self.read: dict[int, list[np.ndarray]] = defaultdict(list)
        self.made: dict[str, list[Any]] = {}

    def run(self) -> None:
        """Warm up, leave out what cannot be compiled, and measure."""
        for name, way in list(self.ways.items()):
            try:
                for _ in range(2):
                    way(self.batches[0], min(WARM_UP, self.new_tokens), lambda tokens: None)
            except RuntimeError as error:
                if not name.endswith(COMPILED):
                    raise
                tqdm.write(f"{name} is left out: torch.compile: {str(error).splitlines()[0]}")
                del self.ways[name]
        before = torch.get_num_threads()
        try:
            for threads, name in tqdm(self._turns(), f"{self.batch_size} at a time", disable=None):
                torch.set_num_threads(threads)
                batches = self.batches[:1] if name in UNCACHED else self.batches
                found = [_timed(self.ways[name], batch, self.new_tokens) for batch in batches]
                self.made[name] = [one for made, _ in found for one in made]
                self.times[threads, name].append(np.stack([waits for _, waits in found]))
                self.read[threads] += [self.reading() for _ in range(OFTEN)]
        finally:
            torch.set_num_threads(before)

    def _turns(self) -> list[tuple[int, str]]:
        """Threads and a way: uncached ones in the first round, which all begin with another way."""
        turns: list[tuple[int, str]] = []
        for threads, round_ in itertools.product(self.suffixes, range(self.rounds)):
            names = [name for name in self.ways if not turns or name not in UNCACHED]
            begin = round_ * len(names) // self.rounds
            turns += [(threads, name) for name in names[begin:] + names[:begin]]
        return turns

    def columns(self, name: str, reads: Mapping[str, Any]) -> dict[str, Any]:
        """Of a way; `reads` has the loops and heads that a token's weights are of, if known."""
        columns: dict[str, Any] = {}
        for threads, suffix in self.suffixes.items():
            if (threads, name) not in self.times:
                continue
            waits, speeds = np.stack(self.times[threads, name]), self._speeds(threads, name)
            low, ms, high = 1e3 * np.nanpercentile(waits[..., 1:], (5, 50, 95))
            own = {"tokens_per_second": np.median(speeds), "ms": ms, "ms_p5": low, "ms_p95": high}
            own["first_ms"] = 1e3 * np.median(waits[..., 0])
            own["speedup"] = np.median(speeds / self._speeds(threads, FULL)[: len(speeds)])
            if loops := reads.get("decoded_loops"):
                least = self._bound_ms(threads, loops, reads["decoded_heads"]) / ms
                own |= dict(zip(("bound_share", "bound_share_all"), least, strict=True))
            columns |= {column + suffix: float(value) for column, value in own.items()}
        return columns | {"rounds": len(self.times[next(iter(self.suffixes)), name])}

    def bounds(self) -> list[dict[str, Any]]:
        """Rows of the readings at full depth: milliseconds a step, the tokens/s that it allows."""
        rows: list[dict[str, Any]] = [{"way": name, "rounds": self.rounds} for name in READINGS]
        for threads, suffix in self.suffixes.items():
            least = self._bound_ms(threads, self.depth, 1).tolist()
            for row, ms in zip(rows, least, strict=True):
                row |= {f"tokens_per_second{suffix}": 1e3 * self.batch_size / ms, f"ms{suffix}": ms}
        return rows

    def _speeds(self, threads: int, name: str) -> np.ndarray:
        """Tokens/s of each round, first tokens apart."""
        waits = np.stack(self.times[threads, name])[..., 1:]
        return self.batch_size / np.nanmean(waits, (1, 2))

    def _bound_ms(self, threads: int, loops: float, heads: float) -> np.ndarray:
        """Without and with keys and values, (2,)."""
        reads = [(1, loops, 0, heads), (1, loops, loops, heads)]
        return 1e3 * np.array(reads) @ np.median(self.read[threads], 0)


def _timed(way: Way, prompts: Prompts, new_tokens: int) -> tuple[Any, np.ndarray]:
    """What the way made, and the seconds that each new token of a row was waited for.

    Tokens that come together share their wait; beside the first one they have none.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marks, steps = [time.perf_counter()], []

    def each(tokens: list[int]) -> None:
        wait(device)
        marks.append(time.perf_counter())
        steps.append(len(tokens) // len(prompts))

    made = way(prompts, new_tokens, each)
    waits = np.repeat(np.diff(marks) / steps, steps)
    waits[: steps[0]] = np.nan
    waits[0] = marks[1] - marks[0]
    return made, waits
