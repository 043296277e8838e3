"""A two-sample test, for a model whose random numbers nobody can seed.

A model is asked about two inputs, n times each, in a random order. If what it gives does not depend
on which of the two it was, every relabelling of the calls is as probable as the true one: a
permutation test of any statistic is then exact (Fisher 1935), whatever the noise.
The statistic is the largest difference of means, in standard deviations of each, over all watched
logits and the mean squared deviation of each position; one distribution of the largest serves all
of them (Westfall and Young 1993).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from crt_lib.audit.asking import Asked
from crt_lib.audit.probes import NOISE, Finding, shape_noise

CALLS = 32  # of each of two inputs
FALSE_ALARMS = 0.01  # at most, of reports on sound models
EFFECT = 1e-3  # of a logit, whose power is stated
PERMUTATIONS = 4_000
WATCHED = 2**13  # logits that are compared, at most


@dataclass(frozen=True)
class Case:
    """Two inputs of which the logits of `row` at the first `watched` positions should be equal."""

    probe: str
    one: Tensor
    other: Tensor
    watched: int
    row: int = 0
    same_shape: bool = True


@dataclass(frozen=True)
class Power:
    """What a test of `calls` calls would have found."""

    calls: int
    noise: float  # the median standard deviation of a logit
    critical: float  # difference of means, in standard deviations, above which it convicts

    def of(self, effect: float) -> float:
        """The probability that a shift of one logit by `effect` is found."""
        spread = math.sqrt(2 / self.calls)
        above = (effect / max(self.noise, 1e-30) - self.critical) / spread
        return 0.5 * math.erfc(-above / math.sqrt(2))

    @property
    def smallest(self) -> float:
        """The shift of one logit that is found nine times of ten."""
        return self.noise * (self.critical + 1.2816 * math.sqrt(2 / self.calls))

    def __str__(self) -> str:
        return (
            f"{self.calls} calls of each of two inputs; a sound model is convicted in at most "
            f"{FALSE_ALARMS:.0%} of reports. A shift of one logit by {EFFECT:g} is found with "
            f"{self.of(EFFECT):.0%}, one by {self.smallest:.1g} with 90%: its noise is "
            f"{self.noise:.1g} (and the table's largest are in units of the noise)"
        )


def cases(asked: Asked) -> list[Case]:
    """What is compared: all, or what has another shape, if equal shapes have equal numbers."""
    ids, C = asked.ids, asked.context
    T = ids.shape[1]
    among = torch.cat([ids, asked.row(T, seed=10)])
    found = []
    if asked.random == "own":
        asked.covered["rows"] = "the other of 2 changed"
        at = {("tokens", p): ids for p in sorted({0, (T - 1) // 2, T - 2})}
        if C > T:
            row = asked.row(C, seed=3)
            at |= {("far", p): row for p in (C // 2 - 1, C - 2)}
        for (probe, p), row in at.items():
            changed = torch.cat([row[:, : p + 1], asked.others(row[:, p + 1 :], seed=100 + p)], 1)
            found.append(Case(probe, row, changed, p + 1))
        asked.covered["cuts"] = "after " + ", ".join(
            f"position {p} of {row.shape[1]}" for (_, p), row in at.items()
        )
        replaced = torch.cat([ids, asked.others(among[1:], seed=9)])
        found.append(Case("rows", among, replaced, T))
    if C > T:
        row = asked.row(C, seed=4)
        found.append(Case("lengths", row, row[:, : C // 2], C // 2, same_shape=False))
    for n in sorted({max(T // 2, 1), T - 1}):
        found.append(Case("prefix", ids, ids[:, :n], n, same_shape=False))
    if not asked.one_by_one:
        found.append(Case("count", among, ids, T, same_shape=False))
    return found


@torch.no_grad()
def two_samples(
    asked: Asked, calls: int = CALLS
) -> tuple[dict[str, dict[int, Finding]], dict[str, str], Power | None]:
    """By probe and exit the findings of all `cases`; why some failed; the weakest test's power."""
    found: dict[str, dict[int, Finding]] = {}
    failed: dict[str, str] = {}
    every, powers = cases(asked), []
    for number, case in enumerate(every):
        try:
            columns, power = _compare(asked, case, calls, FALSE_ALARMS / len(every), number)
        except Exception as error:  # anybody's model: it may fail in any way
            failed[case.probe] = f"it fails: {type(error).__name__}: {error}"
            continue
        powers.append(power)
        for loop, column in columns.items():
            ahead = None if case.probe in ("rows", "count") else 1
            one = Finding(column[:, None], power.critical, torch.tensor([case.watched]), ahead)
            before = found.setdefault(case.probe, {}).get(loop)
            found[case.probe][loop] = one if before is None else _beside(before, one)
    return found, failed, max(powers, key=lambda power: power.smallest, default=None)


def _beside(one: Finding, other: Finding) -> Finding:
    """Both columns, each in units of its critical value."""
    scaled = [column for x in (one, other) for column in (x.influence / x.tolerance).T]
    columns = torch.cat([one.columns, other.columns])
    return Finding(pad_sequence(scaled), 1.0, columns, one.ahead)


def _compare(
    asked: Asked, case: Case, calls: int, level: float, number: int
) -> tuple[dict[int, Tensor], Power]:
    """By exit the statistic of each watched position, and what convicts at `level`."""
    generator = torch.Generator().manual_seed(number)
    order = torch.arange(2 * calls)[torch.randperm(2 * calls, generator=generator)] < calls
    samples: list[Tensor] = []
    kept, scale, shares = torch.empty(0), 0.0, 0.0
    for i, first in enumerate(order.tolist()):
        logits = asked(case.one if first else case.other, seed=1 + i + 2 * calls * number)
        shares = max(shares, NOISE if case.same_shape else shape_noise(asked))
        watched = {k: x[case.row, : case.watched].float().cpu() for k, x in logits.items()}
        kept = kept if samples else _kept(case, watched, generator)
        seen = [x[:, kept].nan_to_num(0.0, 0.0, 0.0) for x in watched.values()]
        samples.append(torch.stack(seen))  # (exits, watched, kept)
        scale = max(scale, float(samples[-1].abs().max()))
    stacked = torch.stack(samples).double()  # (2 calls, exits, watched, kept)
    values = stacked - stacked.mean(0)
    squares = values.pow(2)
    noise = squares.mean(0).sqrt()
    spread = squares.mean(-1, keepdim=True)  # what moves the noise of a whole position
    floor = shares * scale + 1e-150
    values = values / noise.clamp(min=floor)
    spread = spread - spread.mean(0)
    spread = spread / spread.pow(2).mean(0).sqrt().clamp(min=floor**2)
    both = torch.cat([values, spread], -1).float()
    signs = torch.where(order, 1.0, -1.0)
    largest = torch.zeros(PERMUTATIONS)
    for part in both.flatten(1).split(2**12, 1):
        largest = torch.maximum(largest, (_relabelled(calls) @ part).abs().amax(1) / calls)
    allowed = math.floor(level * (PERMUTATIONS + 1))  # of all relabellings, the true one included
    critical = float(largest.sort(descending=True).values[max(allowed - 1, 0)])
    apart = ((signs @ both.flatten(1)) / calls).abs().view(both.shape[1:])
    columns = dict(zip(watched, apart.amax(-1), strict=True))  # (watched,) of each exit
    return columns, Power(calls, float(noise.median()), max(critical, 1e-30))


@functools.cache
def _relabelled(calls: int) -> Tensor:
    """(PERMUTATIONS, 2 calls): 1 and -1, as many of each, in random orders."""
    order = torch.rand(PERMUTATIONS, 2 * calls, generator=torch.Generator().manual_seed(0))
    return torch.where(order.argsort(1) < calls, 1.0, -1.0)


def _kept(case: Case, watched: dict[int, Tensor], generator: torch.Generator) -> Tensor:
    """Which logits are compared: those of the tokens of both inputs, and others at random."""
    size = next(iter(watched.values())).shape[-1]
    most = max(16, WATCHED // (len(watched) * case.watched))
    here = torch.cat([case.one.flatten(), case.other.flatten()]).cpu().flip(0).unique()
    rest = torch.randperm(size, generator=generator)
    return torch.cat([here[here < size], rest]).unique_consecutive()[:most].unique()
