"""Exits with a promise: thresholds chosen on half of valid, kept where the other half agrees.

Learn, then test (Angelopoulos et al. 2021, arXiv:2110.01052), as CALM does it (Schuster et al.
2022, arXiv:2207.07061), with an interval over documents in place of a bound for losses in [0, 1].
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from crt_lib.audit.compare import Interval, by_document
from crt_lib.bench.drafts import FEWEST, bench_drafts
from crt_lib.bench.exits import bench_exits
from crt_lib.bench.ways import PROMPT_TOKENS, passages
from crt_lib.exits.choice import FULL, Choice, Choices
from crt_lib.exits.policy import Policy
from crt_lib.study.policies import calibrate_taken, taken_losses

if TYPE_CHECKING:
    from crt_lib.exits.trace import Trace
    from crt_lib.model import CRT
    from crt_lib.text.tokenizer import TokenizedCorpus

TIMED_TOKENS = 256  # of a window
TEXTS, WRITTEN = 16, 64  # that a speculation continues, and its tokens, as `crt generate` has them


def calibrate_exits(
    model: "CRT",
    data: "TokenizedCorpus",
    valid: "Trace",
    test: "Trace",
    budget: float,
    groups: int = 4,
) -> Choices:
    """The ways to decode that lose at most `budget`, a share of the perplexity, and their speed.

    Thresholds are chosen on the first half of the documents of `valid`; a way is kept where the
    95 % interval of what it loses on the other half (on all, where there is no threshold to
    choose), exits taken, ends within the budget. Speeds are of `groups` windows of valid, one text
    at a time. Full depth is always kept. Of each way it is noted what it loses on `test`.
    """
    middle = int(np.searchsorted(valid.document, (valid.document[-1] + 1) // 2))
    learned = valid.some(slice(middle))  # the first half of the documents
    policies = {str(k): Policy(fixed=k) for k in model.config.exit_loops}
    for name in valid.scores:
        policy = calibrate_taken(model, data, learned, name, budget)
        if policy.criterion is not None:
            policies[name] = policy
    kept: dict[str, Choice] = {}
    failed: dict[str, Choice] = {}
    for name, policy in policies.items():
        lost = _lost(model, data, valid, policy, middle if policy.asks else 0)
        paid = _lost(model, data, test, policy)
        of_test: dict[str, Any] = {"paid": paid.mean, "paid_low": paid.low, "paid_high": paid.high}
        way = Choice(policy, above=lost.mean, high=lost.high, **of_test)
        (kept if lost.high <= math.log1p(budget) else failed)[name] = way
    length = min(TIMED_TOKENS, valid.seq_len, model.config.max_seq_len)
    ids, eot = data.valid.ids, data.tokenizer.eot_id
    timed = {"full depth": Policy()} | {name: way.policy for name, way in kept.items()}
    rows = bench_exits(model, ids, eot, timed, seq_len=length, groups=groups)
    speed = {row["policy"]: row["speedup"] for row in rows}
    ways = {FULL: Choice()}
    ways |= {name: dataclasses.replace(way, speedup=speed[name]) for name, way in kept.items()}
    written = min(WRITTEN, max(FEWEST, length // 2))
    prompts = passages(ids, TEXTS, min(PROMPT_TOKENS, length - written))
    for row in bench_drafts(model, prompts, written, temperatures=(0.0,)):
        loop, last = row["draft_loop"], row["last"]
        drafted: dict[str, Any] = {"draft_loop": loop, "speedup": row["speedup"]}
        if last == model.config.n_loops:
            ways[f"speculation from {loop or 'the text'}"] = Choice(**drafted)
        elif str(last) in kept:
            name = f"exit {last}, speculation from the text"
            ways[name] = dataclasses.replace(kept[str(last)], **drafted)
    return Choices(budget, ways, failed)


def hold_to(
    choices: Choices, model: "CRT", data: "TokenizedCorpus", trace: "Trace"
) -> list[dict[str, Any]]:
    """A row a policy of `choices`, kept or failed: what it loses on `trace`, of any text.

    `above`, `low` and `high`: nats a token above full depth, exits taken, and the 95 % interval
    over documents.
    """
    about = {name: trace.about[name] for name in ("corpus", "split")}
    about |= {"tokens": len(trace.loss), "full_loss": float(trace.loss[:, -1].mean())}
    rows = []
    for name, way in {**choices.ways, **choices.failed}.items():
        if way.draft_loop is None and name != FULL:
            lost = _lost(model, data, trace, way.policy)
            found = {"policy": name, "kept": name in choices.ways, "budget": choices.budget}
            found |= {"above": lost.mean, "low": lost.low, "high": lost.high}
            rows.append(about | found)
    return rows


def _lost(
    model: "CRT", data: "TokenizedCorpus", trace: "Trace", policy: Policy, begin: int = 0
) -> Interval:
    """Nats a token above full depth of `trace` from token `begin` on, the start of a document."""
    above = (taken_losses(model, data, trace, policy) - trace.loss[:, -1])[begin:, None]
    (lost,) = by_document(trace.document[begin:] - trace.document[begin], above)
    return lost
