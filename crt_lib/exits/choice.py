"""How a checkpoint is best decoded: the ways that `crt calibrate` found to keep a promise."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.files import InputError, sha256, write_text

CHOICES_FILE = "exits.json"  # beside the checkpoint that it is of
FULL, AUTO = "full", "auto"


@dataclass(frozen=True)
class Choice:
    """A way to decode, and what it was measured to lose and save.

    A policy; with `draft_loop` (as `Speculation` has it) drafted, of full depth or a fixed exit.
    """

    policy: Policy = dataclasses.field(default_factory=Policy)
    draft_loop: int | None = None
    above: float = 0.0  # nats a token above full depth
    high: float = 0.0  # the upper end of its 95 % interval
    speedup: float = 1.0  # one text at a time
    # the same of test, which chose nothing: what the promise came to
    paid: float | None = None
    paid_low: float | None = None
    paid_high: float | None = None


@dataclass(frozen=True)
class Choices:
    """Of one checkpoint, by name: full, exits by their loop, criteria, "speculation from k" or
    "from the text", "exit k, speculation from the text".

    Each loses at most `budget`, a share of the perplexity, on documents that chose no threshold;
    each of `failed`, which are not timed, was tried there and may lose more.
    """

    budget: float
    ways: Mapping[str, Choice]
    failed: Mapping[str, Choice] = dataclasses.field(default_factory=dict)

    def fastest(self, drafted: bool = True) -> str:
        """The name of the fastest way; without `drafted`, of policies alone."""
        names = [name for name, way in self.ways.items() if drafted or way.draft_loop is None]
        return max(names, key=lambda name: self.ways[name].speedup)

    def policies(self) -> dict[str, dict[str, Any]]:
        """Settings of each policy by name, and of the fastest one as AUTO."""
        kept = {name: way for name, way in self.ways.items() if way.draft_loop is None}
        kept[AUTO] = kept[self.fastest(drafted=False)]
        return {name: dataclasses.asdict(way.policy) for name, way in kept.items()}

    def said(self, way: Choice) -> str:
        """One line about a way of these."""
        name = next(name for name, own in self.ways.items() if own == way)
        lost = "the text of full depth" if way.high == 0 else f"within +{self.budget:.2%} PPL"
        name = f"exit {name}" if name.isdecimal() else name
        return f"{name}: {lost}, {way.speedup:.2f}x its speed when calibrated"

    def save(self, path: str | Path, checkpoint: str) -> None:
        """Write it atomically; `checkpoint` is the digest of the file that it belongs to."""
        about = {"checkpoint": checkpoint, **dataclasses.asdict(self)}
        write_text(Path(path), json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, checkpoint: str) -> "Choices | None":
        """What is in `path`; None if there is nothing or it belongs to another checkpoint.

        Raises InputError for a file that is none of `save`.
        """
        if not Path(path).is_file():
            return None
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            ways, failed = (
                {
                    name: Choice(**way | {"policy": Policy(**way["policy"])})
                    for name, way in of.items()
                }
                for of in (about["ways"], about.get("failed", {}))  # older files have no failed
            )
            budget, of = float(about["budget"]), about["checkpoint"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise InputError(
                f"{path} is not of `crt calibrate`: {error!r}; run it again"
            ) from error
        return cls(budget, ways, failed) if of == checkpoint else None


def choices_of(checkpoint: Path) -> Choices | None:
    """Those beside a checkpoint file, as `Choices.load`."""
    return Choices.load(checkpoint.with_name(CHOICES_FILE), sha256(checkpoint.read_bytes()))


def choose(
    choices: Choices | None,
    name: str | None = None,
    *,
    budget: float | None = None,
    drafted: bool = True,
) -> Choice:
    """The way of that name: "full", an exit's loop, or a criterion. None: the fastest one.

    `budget`: the share of the perplexity that it may lose. `drafted`: whether the fastest may be
    speculation. Raises InputError for what was not calibrated, may lose more than a budget that is
    given, or for another budget.
    """
    if budget is not None and (choices is None or not math.isclose(budget, choices.budget)):
        known = "it was not calibrated" if choices is None else f"it is {choices.budget:.3%}"
        raise InputError(
            f"a budget of {budget:.3%} is not this checkpoint's: {known}; `crt calibrate RUN "
            f"--budget {100 * budget:g}` calibrates its exits for it"
        )
    if name == FULL or (name is None and choices is None):
        return Choice()
    if name is None:
        assert choices is not None
        return choices.ways[choices.fastest(drafted)]
    exits = name.isdecimal()
    if not exits and name not in CRITERIA:
        raise InputError(f"exit {name!r} is not full, a loop or one of {', '.join(CRITERIA)}")
    if choices is not None and name in choices.ways:
        return choices.ways[name]
    if exits and budget is None:
        return Choice(Policy(fixed=int(name)))
    if choices is None:
        raise InputError(
            f"{name} is not calibrated for this checkpoint; `crt calibrate RUN` does it, or give "
            "thresholds of your own (--tau0, --tau-min, --decay)"
        )
    said = "was not tried" if exits else "is no cheaper than a fixed exit"
    said += f" within +{choices.budget:.2%} perplexity"
    if name in choices.failed:
        lost = math.expm1(choices.failed[name].high)
        said = f"may lose {lost:.2%} of the perplexity, more than {choices.budget:.2%}"
    raise InputError(
        f"{'exit ' if exits else ''}{name} {said}; take {choices.fastest(drafted=False)}, "
        "calibrate for a larger budget, or "
        + ("leave out --budget" if exits else "give thresholds of your own (--tau0, --tau-min)")
    )


def drafts(choices: Choices | None, last: int | None = None) -> int:
    """The loop whose drafts were fastest when calibrated; InputError where none was.

    The drafts of full depth's text, or of that of the exit after loop `last`.
    """
    ways = (choices.ways if choices else {}).values()
    timed = {way.draft_loop: way.speedup for way in ways if way.policy.fixed == last}
    loops = [loop for loop in timed if loop is not None]
    if not loops:
        raise InputError(
            f"no drafts of {f'exit {last}' if last else 'full depth'} are calibrated for this "
            "checkpoint; `crt calibrate RUN` calibrates those that keep its budget"
        )
    return max(loops, key=timed.__getitem__)
