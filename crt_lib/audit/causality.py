"""Does a language model see the tokens it is asked to predict?

Each probe asks in another way, since each misses leaks that another finds: a filter with
wrap-around shows in evaluation, a batch norm over time only in training, a mean over what is there
only when the end is cut off, a mask of another length only far from the start.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crt_lib.audit import asking, sampled
from crt_lib.audit.advice import advice_for
from crt_lib.audit.asking import Asked, NotAsked
from crt_lib.audit.probes import Finding
from crt_lib.audit.reach import PROBES, Example, example_of
from crt_lib.cached.step import evaluating
from crt_lib.evaluate import Model
from crt_lib.files import InputError

CUTS = ("far", "prefix", "decode", "lengths")  # tell where something begins that is seen, not what
SAYS = {  # of a probe that found something, what it means; the first one is said
    "rows": "rows of a batch see each other",
    "decode": "its cache gives other logits than its forward pass",
    "count": "the number of rows changes its logits",
    "padding": "left padding changes its logits",
}
SEES = "sees the future"
_RANDOM = {
    "": "",
    "seeded": "torch, numpy and Python were seeded alike before each call",
    "own": "its random numbers cannot be seeded",
}


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
    power: sampled.Power | None = None
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
            return "cannot tell: no token could be changed"
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
        elif "(100%)" not in self.covered.get("vocabulary", ""):
            open_.append("a leak that only tokens trigger that were not asked")
        if "all " not in self.covered.get("cuts", "all "):
            open_.append("a near leak at the few positions that no cut crossed")
        if self.random == "own":
            open_.append("a leak much smaller than its noise")
        asked = "a leak below 1e-5 of what a token itself moves, or beyond the longest row"
        return [*open_, asked]

    def rows(self) -> list[dict[str, Any]]:
        """A row a probe and exit: leaking pairs, distances, and the largest forbidden influence."""
        table = []
        for name, by_exit in self.findings.items():
            for loop, found in by_exit.items():
                near, far = found.offsets or (None, None)
                table.append(
                    {
                        "probe": name,
                        "exit": loop,
                        "pairs": len(found.pairs),
                        "nearest": near,
                        "furthest": far,
                        "largest": found.largest,
                        "tolerance": found.tolerance,
                    }
                )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what `crt audit --json` prints."""
        return {
            "verdict": self.verdict,
            "status": self.status,
            "leaks": self.leaks,
            "convicting": self.convicting,
            "first_leaking_offset": self.first_leaking_offset,
            "example": None if self.example is None else vars(self.example),
            "findings": self.rows(),
            "not_asked": self.left_out,
            "covered": self.covered,
            "not_excluded": self.not_excluded,
            "random": self.random,
            "power": None if self.power is None else vars(self.power),
            "seconds": round(self.seconds, 2),
        }

    def evidence(self) -> list[str]:
        """The table of the findings, in lines."""
        lines = ["probe       exit  leaking pairs  nearest  furthest   largest"]
        for row in self.rows():
            near, far = (row[key] or "-" for key in ("nearest", "furthest"))
            lines.append(
                f"{row['probe']:<11}{row['exit']:>5}{row['pairs']:>15}{near:>9}{far:>10}"
                f"{row['largest']:>10.1e}"
            )
        return lines + [f"{name:<11}not asked: {why}" for name, why in self.left_out.items()]

    def __str__(self) -> str:
        lines = [f"verdict: {self.verdict}"]
        if self.example is not None:
            lines.append(f"for example, {self.example}")
        lines += ["", *self.evidence(), "", f"covered, in {self.seconds:.1f} s:"]
        lines += [f"  {name}: {said}" for name, said in self.covered.items()]
        if self.random:
            lines.append(f"  random: {_RANDOM[self.random]}")
        if self.power is not None:
            which = "" if self.random == "own" else ", of lengths and numbers of rows alone"
            lines.append(f"  two-sample test{which}: {self.power}")
        lines += ["not excluded:", *(f"  {said}" for said in self.not_excluded)]
        if self.leaks:
            lines += ["", "how to fix it:"]
            for cause, code in advice_for(self.convicting):
                lines += [f"  {cause}", *(f"      {line}" for line in code.splitlines())]
        return "\n".join(lines)


def causality_report(
    model: Model,
    vocab_size: int | None = None,
    *,
    length: int = 24,
    seed: int = 0,
    context: int | None = None,
    seconds: float = 10.0,
) -> CausalityReport:
    """Which logits of `model` depend on which later tokens, or on other rows of a batch.

    `model`: a CRT, a causal language model of transformers, or any callable from ids (B, T) to
    logits (B, T, V), to `{exit: logits}` or to an object with `.logits`. A module is asked in
    evaluation mode, and is left as it was. `vocab_size`: None to ask the model. Each probe
    (`crt_lib.audit.reach.PROBES`) has a random row of `length` tokens; some have one of `context`
    (None: all positions that the model declares, at most 2,048; 512 if it declares none), and take
    `seconds`, on a slow model, for what grows with the vocabulary and the context.

    A probe at which the model fails is left out, with its error. Random numbers of torch, numpy and
    Python are seeded alike before each call; for a model that is random all the same, a two-sample
    test takes the place of the probes (`crt_lib.audit.sampled`). Raises InputError for a length
    below 2 and for a model that fails on a plain row, whose logits are not numbers, or do not have
    the shape (B, T, vocab_size or more).
    """
    began = time.monotonic()
    if length < 2:
        raise InputError(f"the length is {length}; a later token needs at least 2")
    size = vocab_size or asking.vocabulary_of(model)
    declared = context or asking.positions_of(model)
    length = min(length, declared or length)
    ids = asking.probe_ids(model, size, length, seed)
    asked = Asked(model, ids, size, seconds=seconds)
    with asking.own_random_numbers(), evaluating(model), torch.no_grad():
        _check(asked)
        longest = min(declared or asking.UNDECLARED, context or asking.AT_MOST)
        asked.context = asking.longest_row(asked, longest)
        if context is not None and asked.context < context:
            raise InputError(f"the model takes rows of {asked.context} tokens, not of {context}")
        found, left_out = _ask_all(asked)
        if not _again(asked, found):
            asked.random = "own"
            found, left_out = _ask_all(asked)
        power = None
        if asked.random:
            tested, power = sampled.two_samples(asked)
            found |= tested
            left_out = {name: why for name, why in left_out.items() if name not in found}
        found = {name: found[name] for name in PROBES if name in found}
        example = _example(asked, found)
    if declared and declared > asked.context:
        asked.covered["positions"] += f" of the {declared:,} that it declares"
    took = time.monotonic() - began
    rest = (asked.covered, example, asked.random, power, took)
    return CausalityReport(found, left_out, length, asked.context, *rest)


def assert_causal(model: Model, vocab_size: int | None = None, **options: Any) -> None:
    """Raise AssertionError, with the report, for a model that sees what it should not.

    For test suites; also raises it where nothing could be told. `options` as `causality_report`
    takes them; raises InputError as that does.
    """
    report = causality_report(model, vocab_size, **options)
    if report.status:
        raise AssertionError(str(report))


def _ask_all(asked: Asked) -> tuple[dict[str, dict[int, Finding]], dict[str, str]]:
    """The findings of the probes that can be asked, and why the others cannot."""
    found: dict[str, dict[int, Finding]] = {}
    left_out: dict[str, str] = {}
    reach = max(asked.context, asked.ids.shape[1])
    rows = f"rows of {asked.ids.shape[1]} and {reach} tokens"
    asked.covered["positions"] = f"0-{reach - 1}, distances up to {reach - 1}: {rows}"
    for name in sorted(PROBES, key=lambda name: name not in ("rows", "count")):  # these come first
        try:
            if asked.random == "own":
                raise NotAsked("its random numbers cannot be seeded")
            found[name] = PROBES[name](asked)
        except NotAsked as why:
            left_out[name] = str(why)
        except Exception as error:  # anybody's model: it may fail in any way
            left_out[name] = f"it fails: {type(error).__name__}: {error}"
        if name == "rows" and asked.random != "own":
            leaks = any(len(x.pairs) for x in found.get(name, {}).values())
            asked.one_by_one = name not in found or leaks
    return found, left_out


def _again(asked: Asked, found: dict[str, dict[int, Finding]]) -> bool:
    """Whether what convicts does so a second time: else it was rare noise."""
    for name in PROBES:
        if any(len(x.pairs) for x in found.get(name, {}).values()):
            for loop, second in PROBES[name](asked).items():
                first = found[name][loop]
                if first.influence.shape == second.influence.shape:
                    return torch.equal(first.influence, second.influence)
                return bool(len(second.pairs)) or not len(first.pairs)
    return True


def _example(asked: Asked, found: dict[str, dict[int, Finding]]) -> Example | None:
    """The nearest leak, as far as the probes tell which token is seen."""
    if asked.random == "own":
        return None
    for loop, finding in found.get("tokens", {}).items():
        if len(pairs := finding.pairs):
            t, j = pairs[(pairs[:, 1] - pairs[:, 0]).argmin()].tolist()
            return Example(loop, t, j, j, float(finding.influence[t, j]))
    return example_of(asked, found.get("far", {}))


def _check(asked: Asked) -> None:
    ids = asked.ids
    try:
        once = asked(ids)
        asked(asked.others(ids, seed=1))  # what it remembers of another row must not come back
        again, otherwise = asked(ids), asked(ids, seed=1)
    except Exception as error:  # anybody's model: it may fail in any way
        raise InputError(
            f"the model fails on ids of shape {tuple(ids.shape)}: {type(error).__name__}: {error}"
        ) from error
    for loop, logits in once.items():
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            given = getattr(logits, "shape", type(logits).__name__)
            raise InputError(f"the model gives {given} for ids {tuple(ids.shape)}, not (B, T, V)")
        if logits.isnan().any():
            raise InputError("the model gives logits that are not numbers")
        if asking.largest_difference(logits, again[loop]).any():
            asked.random = "own"
        elif asking.largest_difference(logits, otherwise[loop]).any():
            asked.random = asked.random or "seeded"
