"""Does a language model see the tokens it is asked to predict?

Each probe asks in another way, since each misses leaks that another finds: a filter with
wrap-around shows in evaluation, a batch norm over time only in training, a mean over what is there
only when the end is cut off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crt_lib.audit.probes import PROBES, Finding, NotAsked, largest_difference, probe_ids
from crt_lib.cached.step import evaluating
from crt_lib.evaluate import Model, logits_of
from crt_lib.files import InputError

WHOLE = ("prefix", "decode")  # probes that tell the first missing token, not which one is seen


@dataclass(frozen=True)
class CausalityReport:
    """The findings of each probe by exit, and why a probe was left out; `print` shows a table."""

    findings: dict[str, dict[int, Finding]]
    left_out: dict[str, str]
    length: int  # tokens of the row; `far` has more

    @property
    def convicting(self) -> list[str]:
        """The probes that found, at any exit, that logits depend on what comes later."""
        found = self.findings.items()
        return [name for name, by_exit in found if any(len(x.pairs) for x in by_exit.values())]

    @property
    def leaks(self) -> bool:
        """Whether any probe did."""
        return bool(self.convicting)

    @property
    def first_leaking_offset(self) -> int | None:
        """The smallest j - t > 0 at which token j moves the logits at t; None when causal.

        Where only cutting the end off shows it, the smallest distance to a cut; None where only
        `far` does.
        """
        near = [name for name in self.convicting if name != "far"]
        exact = [name for name in near if name not in WHOLE] or near
        found = (x.offsets for name in exact for x in self.findings[name].values())
        return min((offsets[0] for offsets in found if offsets), default=None)

    @property
    def changes(self) -> dict[int, Tensor]:
        """The influence (T, T) of each token on each position, by exit, in evaluation mode."""
        return {loop: found.influence for loop, found in self.findings["tokens"].items()}

    def __str__(self) -> str:
        lines = ["probe      exit  leaking pairs  nearest  furthest   largest"]
        for name, by_exit in self.findings.items():
            for loop, found in by_exit.items():
                near, far = (name != "far" and found.offsets) or ("-", "-")
                worst = found.influence.triu(found.ahead).max().item()
                lines.append(
                    f"{name:<10}{loop:>5}{len(found.pairs):>15}{near:>9}{far:>10}{worst:>10.1e}"
                )
        lines += [f"{name:<10}not asked: {why}" for name, why in self.left_out.items()]
        verdict = f"causal, as far as {self.length} tokens show"
        if self.convicting == ["decode"]:
            verdict = "its cache gives other logits than its forward pass"
        elif self.leaks:
            verdict = "sees the future"
        elif "far" in self.findings:
            verdict += "; nor does the first half of a long row see the second"
        return "\n".join([*lines, f"verdict: {verdict}"])


def causality_report(
    model: Model, vocab_size: int, *, length: int = 24, seed: int = 0
) -> CausalityReport:
    """Which logits of `model` depend on which later tokens of a random row of `length`.

    `model`: a CRT, a causal language model of transformers, or any callable from ids (B, T) to
    logits (B, T, V), to `{exit: logits}` or to an object with `.logits`. A module is asked in
    evaluation mode, and is left as it was. A probe (`crt_lib.audit.probes.PROBES`) at which the
    model fails is left out, with its error. Raises InputError for a length below 2 and for a model
    that fails on a plain row, whose logits differ between two equal calls, are not numbers, or do
    not have the shape (B, T, vocab_size or more).
    """
    if length < 2:
        raise InputError(f"the length is {length}; a later token needs at least 2")
    ids = probe_ids(model, vocab_size, length, seed)
    findings: dict[str, dict[int, Finding]] = {}
    left_out: dict[str, str] = {}
    with torch.random.fork_rng(), evaluating(model), torch.no_grad():
        _check(model, ids)
        for name, probe in PROBES.items():
            try:
                findings[name] = probe(model, ids, vocab_size)
            except NotAsked as why:
                left_out[name] = str(why)
            except Exception as error:  # anybody's model: it may fail in any way
                left_out[name] = f"it fails: {type(error).__name__}: {error}"
    return CausalityReport(findings, left_out, length)


def _check(model: Model, ids: Tensor) -> None:
    try:
        once, again = logits_of(model, ids), logits_of(model, ids)
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
        if largest_difference(logits, again[loop]).any():
            raise InputError("the model gives other logits for the same ids: it is random")
