"""Does a language model see the tokens it is asked to predict?

Each probe asks in another way, since each misses leaks that another finds: a filter with
wrap-around shows in evaluation, a batch norm over time only in training, a mean over what is there
only when the end is cut off, a mask of another length only far from the start.
"""

import contextlib
import copy
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from crt_lib.audit import asking, sampled
from crt_lib.audit.asking import Asked, Logits, NotAsked
from crt_lib.audit.probes import NOISE, Finding, rounding
from crt_lib.audit.reach import PROBES, Example, example_of
from crt_lib.audit.report import CausalityReport
from crt_lib.cached.step import evaluating
from crt_lib.evaluate import Model
from crt_lib.files import InputError

DELAY = 5  # seconds after which a terminal sees how far it is
FILTERED = 64  # roundings of the largest logit: what a filter by FFT over a long row comes to
SUSPECT = 1e-3  # of what a token itself moves: a smaller finding may be rounding


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
    test takes the place of the probes (`crt_lib.audit.sampled`). Raises InputError for numbers that
    no row or vocabulary has (`crt_lib.audit.asking.check_numbers`), for what is no model or fails
    on a plain row, and for logits that are not numbers or do not have the shape (B, T, V); also for
    encoder-decoders, masked and diffusion models.
    """
    began = time.monotonic()
    if not callable(model):
        raise InputError(f"a {type(model).__name__} is no model: give what makes logits of ids")
    asking.refuse(getattr(model, "config", None), type(model).__name__)
    asking.check_numbers(length, vocab_size, context, seed, seconds)
    size = asking.vocabulary_of(model) if vocab_size is None else vocab_size
    declared = context or asking.positions_of(model)
    length = min(length, declared or length)
    asked = Asked(model, asking.probe_ids(model, size, length, seed), size, seconds=seconds)
    with asking.own_random_numbers(), evaluating(model), torch.no_grad():
        _check(asked)
        longest = min(declared or asking.UNDECLARED, context or asking.AT_MOST)
        asked.context = asking.longest_row(asked, longest)
        if context is not None and asked.context < context:
            raise InputError(f"the model takes rows of {asked.context} tokens, not of {context}")
        found, left_out, power = _ask(asked)
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


Found = dict[str, dict[int, Finding]]  # by probe and exit


def _ask(asked: Asked) -> tuple[Found, dict[str, str], sampled.Power | None]:
    """All findings, why other probes were left out, and the power of tests where it is random."""
    found, left_out = _ask_all(asked)
    if not _again(asked, found):
        asked.random = "own"
        asked.covered.clear()
        found, left_out = _ask_all(asked)
    found |= _judged_again(asked, found)
    power = None
    if asked.random:
        tested, failed, power = sampled.two_samples(asked)
        found |= tested
        every = (left_out | failed).items()
        left_out = {name: why for name, why in every if name not in found}
    return {name: found[name] for name in PROBES if name in found}, left_out, power


def _watched(names: list[str]) -> Iterable[str]:
    """The names, with a bar on a terminal where there is tqdm, which an audit needs not."""
    try:
        from tqdm import tqdm
    except ImportError:
        return names
    return tqdm(names, "probes", leave=False, delay=DELAY, disable=None)


def _ask_all(asked: Asked) -> tuple[Found, dict[str, str]]:
    """The findings of the probes that can be asked, and why the others cannot."""
    found: Found = {}
    left_out: dict[str, str] = {}
    reach = max(asked.context, asked.ids.shape[1])
    rows = f"rows of {asked.ids.shape[1]} and {reach} tokens"
    asked.covered["positions"] = f"0-{reach - 1}, distances up to {reach - 1}: {rows}"
    ordered = sorted(PROBES, key=lambda name: name not in ("rows", "count"))  # these come first
    for name in _watched(ordered):
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


def _again(asked: Asked, found: Found) -> bool:
    """Whether the first probe that convicts says the same a second time: else it was rare noise."""
    for name in PROBES:
        if any(len(x.pairs) for x in found.get(name, {}).values()):
            second = PROBES[name](asked)
            return all(_alike(one, second[loop]) for loop, one in found[name].items())
    return True


def _alike(one: Finding, other: Finding) -> bool:
    if one.influence.shape != other.influence.shape:  # there was time for more, or for less
        return bool(len(one.pairs)) == bool(len(other.pairs))
    return torch.allclose(one.influence, other.influence, rtol=0.01, atol=one.tolerance)


def _judged_again(asked: Asked, found: Found) -> Found:
    """What is found that is so small that it may be rounding: asked anew in double precision.

    Rounding shrinks there, a leak does not. A filter by FFT rounds by what comes later, and numbers
    of 16 bits make that large. Where the model cannot be had in double precision, what is no
    larger than such numbers' rounding is none.
    """
    again: Found = {}
    share = max(SUSPECT, 32 * asked.spacing)
    for name in {*found} - {"prefix", "lengths", "decode", "count", "padding"}:
        seen = [x for x in found[name].values() if len(x.pairs)]
        if not seen or any(x.largest * NOISE > share * x.tolerance for x in seen):
            continue
        try:
            exact: Any = copy.deepcopy(asked.model)
            again[name] = PROBES[name](replace(asked, model=exact.double()))
            asked.covered["double"] = ", ".join(again) + ": asked anew in double precision"
        except Exception:  # anybody's model: it may have no double precision
            long = asked(asked.row(max(asked.context, asked.ids.shape[1]), seed=3))
            sizes = {k: x.nan_to_num(0.0, 0.0, 0.0).abs().max() for k, x in long.items()}
            noise = max(FILTERED * rounding(long), 8 * asked.spacing * (asked.spacing > SUSPECT))
            least = {k: noise * float(size) for k, size in sizes.items()}
            asked.covered["rounding"] = (
                f"a leak below {max(least.values()):.2g} is not told from it, since there is no "
                "such model in double precision"
            )
            again[name] = {
                k: replace(x, tolerance=max(x.tolerance, least[k])) for k, x in found[name].items()
            }
    return again


def _example(asked: Asked, found: Found) -> Example | None:
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
    except InputError:
        raise
    except Exception as error:  # anybody's model: it may fail in any way
        raise InputError(
            f"the model fails on ids of shape {tuple(ids.shape)}: {type(error).__name__}: {error}"
        ) from error
    for logits in once.values():
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            given = tuple(logits.shape)
            raise InputError(f"the model gives {given} for ids {tuple(ids.shape)}, not (B, T, V)")
        if logits.isnan().any():
            raise InputError("the model gives logits that are not numbers")
    with contextlib.suppress(Exception), asking.Watched() as within:  # some models bear no watching
        asked(ids)
    asked.spacing = max(rounding(once), within.spacing)
    if not _same(once, again):
        asked.random = "own"
        _check_memory(asked)
    elif not _same(once, otherwise):
        asked.random = "seeded"


def _check_memory(asked: Asked) -> None:
    """Raise InputError for a model whose logits depend on the call before."""
    other = asked.others(asked.ids, seed=1)
    seen = [asked(row) for row in 3 * [other, asked.ids, asked.ids]]
    first, second = seen[1::3], seen[2::3]
    steady = all(_same(one[0], later) for one in (first, second) for later in one[1:])
    if steady and not _same(first[0], second[0]):  # noise is not so regular
        raise InputError(
            "the model remembers: its logits depend on the row that it was asked about before; "
            "give one that begins anew at each call"
        )


def _same(one: Logits, other: Logits) -> bool:
    return not any(asking.largest_difference(x, other[loop]).any() for loop, x in one.items())
