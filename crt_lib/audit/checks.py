"""Why else a loss may be too good: checks of targets, texts and scores, each with its verdict.

What a model alone can be asked is in `crt_lib.audit.causality`; here is what needs the batches, the
tokenizer or a text whose entropy is known.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crt_lib.audit.protocols import PaddingReport
from crt_lib.cached.step import evaluating
from crt_lib.data import NOT_SCORED
from crt_lib.evaluate import Model, device_of, token_losses
from crt_lib.files import InputError
from crt_lib.text import grammar, lookup
from crt_lib.text.tokenizer import Tokenizer

FALSE_ALARMS = 0.01  # of a model that is as good as one can be
KNOWN = ("grammar", "lookup")  # corpora whose entropy is known
_FRESH = 20_000  # a seed of text that no corpus holds
_SHIFTS = {0: "the inputs themselves", 2: "two ahead: shifted twice", -1: "what has come before"}


@dataclass(frozen=True)
class Check:
    """A verdict: the name of what was asked, whether it passed, and the figure behind it."""

    name: str
    passed: bool
    says: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILS'}: {self.name}: {self.says}"


def targets_check(inputs: Tensor, targets: Tensor) -> Check:
    """Whether `targets` (B, T), -100 where nothing is scored, are the next tokens of `inputs`.

    Raises InputError for other shapes, and where nothing is scored.
    """
    if inputs.shape != targets.shape or inputs.ndim != 2:
        raise InputError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} differ")
    if not (targets != NOT_SCORED).any():
        raise InputError("no target is scored")
    agree = {shift: _agreement(inputs, targets, shift) for shift in (1, *_SHIFTS)}
    best = max(agree, key=lambda shift: agree[shift])  # the first of equals: the next token
    if best == 1:
        said = f"{agree[1]:.1%} are the next token of their row"
    else:
        said = f"{agree[best]:.1%} are {_SHIFTS[best]}, {agree[1]:.1%} the next token"
    return Check("targets are the next tokens", best == 1 and agree[1] > 0.5, said)


def _agreement(inputs: Tensor, targets: Tensor, shift: int) -> float:
    T = inputs.shape[1]
    here = targets[:, max(-shift, 0) : min(T, T - shift)]
    there = inputs[:, max(shift, 0) : min(T, T + shift)]
    scored = here != NOT_SCORED
    return float((here == there)[scored].float().mean()) if scored.any() else 0.0


def windows_check(ids: np.ndarray, targets: Iterable[Tensor]) -> Check:
    """Whether each token of a text, `ids` (N,), is scored once by all batches of `targets` (B, T).

    Overlapping windows score what they share once. The first token may have nothing before it.
    """
    scored = Counter(t for batch in targets for t in batch[batch != NOT_SCORED].tolist())
    text = Counter(ids.tolist())
    extra, missing = (scored - text).total(), (text - scored).total()
    said = f"{scored.total():,} are scored of {len(ids):,}; too many {extra:,}, missing {missing:,}"
    return Check("each token is scored once", extra == 0 and missing <= 1, said)


def entropy_check(
    model: Model, tokenizer: Tokenizer, corpus: str = "grammar", *, rows: int = 64, length: int = 64
) -> list[Check]:
    """By exit, whether the loss on fresh text of a known language is below its entropy.

    `corpus`: "grammar", or "lookup" (whose rows are whole lines, whatever `length`). For a model
    that does not see its targets the ratio of its probability of the text to the true one is 1 on
    average at most, so it exceeds 1 / p with a probability of at most p (Ville 1939): of the whole
    text, and of each position. At most 1% of sound models fail, however well they have learned.
    Raises InputError for another corpus, and where tokens are not the language's words.
    """
    if corpus == "grammar":
        text = grammar.sample(rows * length, _FRESH)
        ids, floor = tokenizer.encode(text), np.array(grammar.surprisals(text))
        shape = (rows, length + 1)
    elif corpus == "lookup":
        text = lookup.sample(rows, _FRESH)
        ids, floor = tokenizer.encode(text), np.tile(lookup.surprisals(), rows)
        shape = (rows, lookup.LENGTH)
    else:
        raise InputError(f"the entropy of {corpus!r} is not known; choose 'grammar' or 'lookup'")
    if len(ids) != len(floor):
        raise InputError(f"{len(ids)} tokens are not {len(floor)} words; tokenizer 'word' is meant")
    words = torch.from_numpy(ids[: math.prod(shape)].astype(np.int64)).view(shape)
    floors = torch.from_numpy(floor[: math.prod(shape)]).view(shape)[:, 1:]
    words = words.to(device_of(model))
    with evaluating(model):
        losses = token_losses(model, words[:, :-1], words[:, 1:])
    return [_below(corpus, loop, loss.cpu().double(), floors) for loop, loss in losses.items()]


def _below(corpus: str, loop: int, losses: Tensor, floors: Tensor) -> Check:
    gained = floors - losses  # (rows, T), nats
    whole, positions = float(gained.sum()), gained.sum(0)
    worst = int(positions.argmax())
    level = math.log(2 / FALSE_ALARMS)  # half for the whole, half for all positions together
    at = positions[worst] > level + math.log(len(positions))
    said = f"loss {losses.mean():.3f}, entropy {floors.mean():.3f} nats a token"
    if at:
        said += f"; below it by {positions[worst] / len(losses):.3f} at position {worst}"
    where = f" at exit {loop}" if loop else ""
    return Check(f"no loss below the entropy of {corpus}{where}", not (whole > level or at), said)


def padding_check(report: PaddingReport) -> list[Check]:
    """By exit, whether scored padding flatters the loss of a `padding_report`, by over 1%."""
    return [
        Check(
            "padding is not what is scored" + (f" at exit {loop}" if loop else ""),
            scored >= 0.99 * report.ignored[loop],
            f"{report.share:.0%} of the scored positions are padding: loss {scored:.3f}, without "
            f"them {report.ignored[loop]:.3f}",
        )
        for loop, scored in report.scored.items()
    ]


def tokenizer_check(
    encode: Callable[[str], Any], decode: Callable[[Any], str], texts: Sequence[str]
) -> Check:
    """Whether `texts` come back as they were: what is lost is never predicted, nor counted."""
    lost = [(text, back) for text in texts if (back := decode(encode(text))) != text]
    said = f"{len(texts) - len(lost)} of {len(texts)} texts come back as they were"
    if lost:
        text, back = lost[0]
        pairs = zip(text, back, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
        said += f"; {text[at : at + 20]!r} comes back as {back[at : at + 20]!r}"
    return Check("the tokenizer loses no text", not lost, said)
