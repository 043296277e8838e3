"""Probes of what a few tokens do not show: the whole context, vocabulary, and rows of a batch."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit import probes
from crt_lib.audit.asking import MOST_ROWS, Asked, Logits, NotAsked, largest_difference
from crt_lib.audit.probes import Finding, findings, shape_noise

ROWS = 8  # of a batch
BEFORE, AFTER = 6, 1  # tokens before the one that goes through the vocabulary, and after it
WORDS_LATE = "vocabulary, late"  # what `Asked.covered` calls it
LARGE = 2**11  # a vocabulary of which each token has half as many before it
ODD = 3  # cuts of a row of an odd length
SURE = 8  # cuts of a long row that are made, however slow the model is


@dataclass(frozen=True)
class Example:
    """One leak, as small as it was found: `first` to `last` are changed, and t moves."""

    exit: int
    t: int
    first: int
    last: int
    moved: float

    def __str__(self) -> str:
        what = f"token {self.last} alone"
        if self.first != self.last:
            what = f"what stands at {self.first} to {self.last}"
        where = f" (exit {self.exit})" if self.exit else ""
        return f"{what} moves the logits at position {self.t} by {self.moved:.1e}{where}"


def cuts_of(length: int) -> list[int]:
    """Every position but the last of a row, those first that tell most.

    The last, some spread over the row, the last two dozen, the ends of blocks, then the rest in
    an order that halves the gaps.
    """
    end = length - 2
    spread = [round(end * (1 - i / 7)) for i in range(8)]
    late = list(range(end, max(end - 24, -1), -1))
    blocks = [p for size in (256, 128, 64, 32, 16) for p in range(size - 1, end, size)]
    bits = max(end, 1).bit_length()
    halving = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    every = [*spread, *late, *blocks, *halving]
    return [p for p in dict.fromkeys(every) if 0 <= p <= end]


def _changed_after(asked: Asked, row: Tensor, cuts: Tensor) -> Tensor:
    """(K, T): `row` with all that comes after each cut changed."""
    later = torch.arange(row.shape[1]) > cuts[:, None]
    others = asked.others(row.expand(len(cuts), -1), seed=5)
    return torch.where(later.to(row.device), others, row)


def far(asked: Asked) -> dict[int, Finding]:
    row = asked.long_row(seed=3)
    C = row.shape[1]
    cuts = torch.tensor(cuts_of(C))
    rows = _changed_after(asked, row, cuts)
    moved = asked.differences(row, rows, seconds=0.5 * asked.seconds, least=SURE)
    cuts, order = cuts[: len(next(iter(moved.values())))].sort()
    asked.covered["cuts"] = _said_of(cuts, C)
    odd = C * 5 // 8 | 1  # a length that no block size divides
    other = torch.tensor([0, odd // 2, odd - 2])  # ODD of them
    shorter = asked.row(odd, seed=6)
    again = asked.differences(shorter, _changed_after(asked, shorter, other))
    influence = {
        loop: torch.cat([matrix[order], F.pad(again[loop], (0, C - odd))]).T
        for loop, matrix in moved.items()
    }
    return findings(influence, columns=torch.cat([cuts, other]) + 1)


def _said_of(cuts: Tensor, length: int) -> str:
    if len(cuts) == length - 1:
        return f"all {len(cuts)} of a row of {length}: from any position to any other"
    gap = int(torch.cat([torch.tensor([-1]), cuts, torch.tensor([length - 1])]).diff().max())
    return (
        f"{len(cuts)} of {length - 1} in a row of {length}: any leak over {gap} tokens or more, "
        "nearer ones where they cross a cut"
    )


def vocabulary(asked: Asked) -> dict[int, Finding]:
    V, reach = asked.vocab_size, max(asked.context, asked.ids.shape[1])
    if V < 2:
        raise NotAsked("there is one token alone")
    before = BEFORE if V <= LARGE else BEFORE // 2
    size = min(before + 1 + AFTER, reach)
    places = {min(before, size - 1): size}
    if reach > size:
        places[reach - 1] = reach  # the last position: there a leak of any onset has begun
    order = torch.randperm(V, generator=torch.Generator().manual_seed(8))
    words = torch.stack([order, order.roll(1), order.roll(1 + V // 2)], 1).to(asked.ids.device)
    every = {at: _of_words(asked, words, at, size) for at, size in places.items()}
    columns = [
        {loop: F.pad(x.amax(0), (0, reach - x.shape[1])) for loop, x in moved.items()}
        for moved in every.values()
    ]
    influence = {loop: torch.stack([c[loop] for c in columns], 1) for loop in columns[0]}
    found = findings(influence, columns=torch.tensor([*every]))
    asked.covered.pop("tokens that are seen", None)
    for name, (at, moved) in zip(("vocabulary", WORDS_LATE), every.items(), strict=False):
        seen = [moved[loop][:, :at].amax(1) > one.tolerance for loop, one in found.items()]
        hits, n = torch.stack(seen).any(0).nonzero()[:, 0].tolist(), len(seen[0])
        asked.covered[name] = _share_of(n, V, at)
        if 0 < len(hits) < n / 2:
            few = (f"{later} (or {other}) after {own}" for own, later, other in words[hits[:4]])
            asked.covered.setdefault("tokens that are seen", f"at position {at}: " + ", ".join(few))
    return found


def _of_words(asked: Asked, words: Tensor, at: int, size: int) -> dict[int, Tensor]:
    """By exit (N, size): how far the logits move for the token at `at`, of a row of its own.

    `words` (V, 3): the own token, a later one, and what that is changed to; all, or those for which
    there is time.
    """
    base = asked.row(size, seed=7).repeat(len(words), 1)
    base[:, at - 1 : at + 1] = words[:, :2]
    rows = base.clone()
    rows[:, at] = words[:, 2]
    return asked.differences(base, rows, seconds=0.3 * asked.seconds)


def _share_of(n: int, of: int, at: int) -> str:
    percent = 100 * n / of  # rounded down: 100 is all of them
    share = f"{int(percent)}%" if percent >= 1 else f"{percent:.2f}%"
    return (
        f"{n:,} of {of:,} tokens ({share}) as the own token at position {at - 1}, "
        f"{min(2 * n, of):,} as a later one at {at}, up to {at} ahead"
    )


def rows(asked: Asked) -> dict[int, Finding]:
    asked, T = replace(asked, one_by_one=False), asked.ids.shape[1]
    moved, size = _beside_others(asked, ROWS, T, range(ROWS))
    asked.covered["rows"] = f"the other {ROWS - 1} of {ROWS} changed, for each of them"
    if (most := asked.at_once(MOST_ROWS, T)) > ROWS:  # as many as other probes ask at once
        among, _ = _beside_others(asked, most, T, (0, most - 1))
        moved = {loop: torch.cat([moved[loop], x], 1) for loop, x in among.items()}
        asked.covered["rows"] += f"; also of {most}, for the first and the last"
    if asked.context > T and asked.at_once(2, asked.context) > 1:
        long, _ = _beside_others(asked, 2, asked.context, range(2))
        short = {loop: F.pad(x, (0, 0, 0, asked.context - T)) for loop, x in moved.items()}
        moved = {loop: torch.cat([short[loop], long[loop]], 1) for loop in long}
        asked.covered["rows"] += f"; also of 2 with {asked.context} tokens"
    return findings(moved, of=moved | size, ahead=None)


def _beside_others(
    asked: Asked, n: int, length: int, slots: Sequence[int]
) -> tuple[Logits, Logits]:
    """By exit how far the rows at `slots` of n move, (length, slots), for the others, and how far
    each moves for its own tokens.
    """
    batch = torch.cat([asked.row(length, seed=10 + i) for i in range(n)])
    others, moved = asked.others(batch, seed=9), []
    before, after = asked(batch), asked(others)
    for slot in slots:
        changed = others.clone()
        changed[slot] = batch[slot]
        moved.append({loop: x[slot] for loop, x in asked(changed).items()})
    influence = {
        k: largest_difference(torch.stack([m[k] for m in moved]), x[list(slots)]).T
        for k, x in before.items()
    }
    return influence, {loop: largest_difference(x, before[loop]) for loop, x in after.items()}


def count(asked: Asked) -> dict[int, Finding]:
    if asked.random:
        raise NotAsked("with other rows it has other random numbers")
    asked = replace(asked, one_by_one=False)
    alone = asked(asked.ids)
    among = [asked(F.pad(asked.ids, (0, 0, 0, n - 1))) for n in range(2, ROWS + 1)]
    asked.covered["numbers of rows"] = f"1 to {ROWS}"
    first = {k: torch.stack([logits[k][0] for logits in among]) for k in alone}
    influence = {k: largest_difference(x, alone[k]).T for k, x in first.items()}
    return findings(influence, shape_noise(asked), alone, ahead=None)


def of_the_long_row(finding: Finding) -> Finding:
    """What `far` found in the row of the whole context, without that of an odd length."""
    influence, columns = finding.influence[:, :-ODD], finding.columns[:-ODD]
    return replace(finding, influence=influence, columns=columns)


def example_of(asked: Asked, found: dict[int, Finding]) -> Example | None:
    """The nearest leak that `far` found: of what comes after a cut, as few tokens as move t."""
    for loop, finding in found.items():
        if len(pairs := of_the_long_row(finding).pairs):
            t, start = pairs[(pairs[:, 1] - pairs[:, 0]).argmin()].tolist()
            return _narrowed(asked, loop, t, start, finding.tolerance)
    return None


def _narrowed(asked: Asked, loop: int, t: int, start: int, tolerance: float) -> Example | None:
    """The first of the tokens from `start` on that moves the logits at t."""
    row = asked.long_row(seed=3)
    cuts = torch.tensor(cuts_of(asked.context))
    other = _changed_after(asked, row, cuts)[(cuts == start - 1).nonzero()[0]]
    before = asked(row)[loop]

    def moves(first: int, last: int) -> float:
        changed = row.clone()
        changed[:, first : last + 1] = other[:, first : last + 1]
        return float(largest_difference(asked(changed)[loop], before)[0, t])

    ends = range(start, asked.context - 1)
    if moves(start, ends.stop) <= tolerance:
        return None
    last = start + bisect_left(ends, True, key=lambda end: moves(start, end) > tolerance)
    first = last if moves(last, last) > tolerance else start
    return Example(loop, t, first, last, moves(first, last))


PROBES: dict[str, Callable[[Asked], dict[int, Finding]]] = {
    "tokens": probes.tokens,  # each token in turn is replaced
    "training": probes.training,  # the same in training mode, with the same numbers and buffers
    "gradient": probes.gradient,  # of a random projection of each logits, to each embedding
    "prefix": probes.prefix,  # the end is cut off, at each position in turn
    "lengths": probes.lengths,  # the same with a long row, at some positions
    "decode": probes.decode,  # tokens come one by one, through the model's own cache
    "far": far,  # all that comes after a cut is replaced, in a row of the whole context
    "vocabulary": vocabulary,  # a later token, early and at the end, goes through the vocabulary
    "labels": probes.labels,  # each label in turn is replaced, for a model that takes them
    "rows": rows,  # the other rows of a batch are replaced
    "count": count,  # a row alone, and among others
    "padding": probes.padding,  # padding on the left, masked, for a model that takes a mask
}
