"""What an audit found: its verdict, the evidence, what was covered and what was not."""

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from crt_lib.audit.probes import Finding
from crt_lib.audit.reach import WORDS_LATE, Example
from crt_lib.audit.sampled import Power

CUTS = ("far", "prefix", "decode", "lengths")  # tell where something begins that is seen, not what
SAYS = {  # of a probe that found something, what it means; the first one is said
    "rows": "rows of a batch see each other",
    "decode": "its cache gives other logits than its forward pass",
    "count": "the number of rows changes its logits",
    "padding": "left padding changes its logits",
}
SEES = "sees the future"
_TESTED = ("prefix", "lengths", "decode", "count", "padding")  # where random numbers differ
_APART = ("labels", "rows", "count", "decode", "padding")  # beside whatever else is wrong
_FIRST = ("tokens", "gradient", "far", "training", "vocabulary", "prefix", "lengths")


def rendered(template: str, **values: Any) -> str:
    """A template of this folder with its values in it, escaped where it is a page of HTML."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    page = template.endswith(".html")
    made = jinja2.Template(text, autoescape=page, trim_blocks=True, lstrip_blocks=True)
    return made.render(values).rstrip("\n")


@dataclass(frozen=True)
class CausalityReport:
    """The findings of each probe by exit, and why a probe was left out; `print` shows it all."""

    findings: dict[str, dict[int, Finding]]
    left_out: dict[str, str]
    length: int  # tokens of the short row
    context: int  # tokens of the long one
    covered: dict[str, str] = field(default_factory=dict)  # what was asked, by its name
    example: Example | None = None
    random: str = ""  # "", "seeded" or "own"
    power: Power | None = None
    seconds: float = 0.0

    @property
    def convicting(self) -> list[str]:
        """The probes that found, at any exit, that logits depend on what they should not."""
        found = self.findings.items()
        return [name for name, by_exit in found if any(len(x.pairs) for x in by_exit.values())]

    @property
    def leaks(self) -> bool:
        """Whether any probe did."""
        return bool(self.convicting)

    @property
    def status(self) -> int:
        """0: nothing found, 1: it leaks, 2: the probes that matter could not be asked."""
        return 1 if self.leaks else 0 if "tokens" in self.findings else 2

    @property
    def verdict(self) -> str:
        """In one line, what it is convicted of, or how far it is cleared."""
        found = self.convicting
        says = [said for name, said in SAYS.items() if name in found]
        if set(found) - set(SAYS):
            says = [SEES, *says]
        if says:
            return "; ".join(says)
        if self.status == 2:
            why = self.left_out.get("tokens", "")
            return "cannot tell: no token could be changed" + (f" ({why})" if why else "")
        return f"causal, as far as {self.context} tokens show"

    @property
    def first_leaking_offset(self) -> int | None:
        """The smallest j - t > 0 at which token j moves the logits at t; None when causal.

        Where only cuts show it: as the nearest leak that was narrowed down, else the smallest
        distance to a cut.
        """
        exact = [name for name in self.convicting if name not in CUTS]
        if not any(self.findings[name][k].offsets for name in exact for k in self.findings[name]):
            if self.example is not None and "prefix" not in self.convicting:
                return self.example.last - self.example.t
            exact = self.convicting
        found = (x.offsets for name in exact for x in self.findings[name].values())
        return min((offsets[0] for offsets in found if offsets), default=None)

    @property
    def changes(self) -> dict[int, Tensor]:
        """The influence (T, T) of each token on each position, by exit, in evaluation mode.

        Empty for a model whose random numbers cannot be seeded.
        """
        if self.random == "own":
            return {}
        return {loop: x.influence for loop, x in self.findings.get("tokens", {}).items()}

    @property
    def not_excluded(self) -> list[str]:
        """What a model could still do that none of the probes would have seen."""
        open_ = ["a leak that one pair of tokens, or longer, triggers together"]
        if "vocabulary" in self.left_out:
            open_.append("a leak that a few tokens of the vocabulary trigger")
        else:
            asked = [self.covered.get(name, "") for name in ("vocabulary", WORDS_LATE)]
            if "(100%)" not in asked[0]:
                open_.append("a leak that only tokens trigger that were not asked")
            if asked[1] and "(100%)" not in asked[1]:
                open_.append("a late leak that only tokens trigger that were not asked at the end")
            open_.append("a leak that one token triggers only at positions where it was not asked")
        if "all " not in self.covered.get("cuts", "all "):
            open_.append("a near leak at positions that no cut crossed")
        open_.append("a number of rows, or a length, that was not asked")
        failed = [name for name, why in self.left_out.items() if why.startswith("it fails")]
        if failed:
            open_.append(f"what {', '.join(failed)} would have shown, which failed")
        if "double" in self.covered:
            open_.append("a leak that the model has not in double precision")
        if self.random:
            open_.append("a leak much smaller than its noise")
        if self.random != "own":
            told = [name for name in self.findings if not (self.random and name in _TESTED)]
            least = {n: max(x.tolerance for x in self.findings[n].values()) for n in told}
            said = ", ".join(f"{name} {size:.0e}" for name, size in least.items())
            open_.append(f"a leak that moves logits by no more than a probe tells: {said}")
        return [*open_, "a leak beyond the longest row"]

    @property
    def advice(self) -> list[tuple[str, str]]:
        """The usual causes, each with lines of code that are right instead.

        Of the probes that tell what is seen, those that the first one to convict points to.
        """
        found = self.convicting
        asked = {*[name for name in _FIRST if name in found][:1], *({*found} & {*_APART})}
        known = tomllib.loads(Path(__file__).with_name("advice.toml").read_text(encoding="utf-8"))
        return [(one["text"], one["code"]) for one in known["cause"] if asked & {*one["probes"]}]

    def rows(self) -> list[dict[str, Any]]:
        """A row a probe and exit: leaking pairs, distances, and the largest forbidden influence."""
        table = []
        for name, by_exit in self.findings.items():
            for loop, found in by_exit.items():
                near, far = found.offsets or (None, None)
                row = {"probe": name, "exit": loop, "pairs": len(found.pairs)}
                row |= {"nearest": near, "furthest": far}
                table.append(row | {"largest": found.largest, "tolerance": found.tolerance})
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, None for what is infinite: what `crt audit --json` prints."""
        moved = {} if self.example is None else vars(self.example)
        return {
            "verdict": self.verdict,
            "status": self.status,
            "leaks": self.leaks,
            "convicting": self.convicting,
            "first_leaking_offset": self.first_leaking_offset,
            "example": _finite(moved) or None,
            "findings": [_finite(row) for row in self.rows()],
            "not_asked": self.left_out,
            "covered": self.covered,
            "not_excluded": self.not_excluded,
            "random": self.random,
            "power": None if self.power is None else vars(self.power),
            "seconds": round(self.seconds, 2),
        }

    def summary(self) -> list[dict[str, Any]]:
        """The `rows` of the probes that convict, and one for each other probe, over all exits."""
        rows = [row for row in self.rows() if row["probe"] in self.convicting]
        for name in [name for name in self.findings if name not in self.convicting]:
            every = [row for row in self.rows() if row["probe"] == name]
            largest = max(row["largest"] for row in every)
            exit_ = "all" if len(every) > 1 else every[0]["exit"]
            rows.append(every[0] | {"exit": exit_, "largest": largest})
        return rows

    def __str__(self) -> str:
        return rendered("report.txt", report=self)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    infinite = (k for k, x in row.items() if isinstance(x, float) and not math.isfinite(x))
    return row | dict.fromkeys(infinite)
