"""Exit policies of a trained model: calibrated on valid, judged on test, with exits taken."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crt_lib.exits.choice import AUTO, Choices, choices_of as choices_of
from crt_lib.exits.perloop import above_full
from crt_lib.exits.policy import Policy
from crt_lib.exits.scoring import evaluate_with_exits
from crt_lib.exits.trace import Trace, apply_policy, calibrate, chance, oracle
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.text.tokenizer import TokenizedCorpus

THRESHOLDS = ("tau0", "tau_min", "decay")
GENERATE = "crt generate"  # the policy that it takes without options
ALLOWED = 0.005  # the share of the perplexity that a calibrated policy may lose


def judge_policies(
    model: CRT, data: TokenizedCorpus, valid: Trace, test: Trace
) -> list[dict[str, Any]]:
    """A row a policy, `chance` and the oracle: its loss and cost on `test`.

    Policies: full depth, each fixed exit, the paper's thresholds, each criterion calibrated on
    `valid`. `above`, `low` and `high`: nats a token above full depth as the trace has it, with the
    interval over documents. `taken`: nats a token with exits taken as in decoding, on the same
    tokens; `taken_above`, `taken_low`, `taken_high`: those above full depth.
    """
    policies = {"full depth": Policy()}
    policies |= {f"exit {loop}": Policy(fixed=loop) for loop in valid.loops[:-1]}
    policies["the paper's thresholds"] = Policy("confidence")
    for name in valid.scores:
        policies[name] = calibrate_taken(model, data, valid, name, ALLOWED)
    outcomes = {name: apply_policy(test, policy) for name, policy in policies.items()}
    outcomes |= {"chance": chance(valid, test, ALLOWED), "oracle": oracle(test)}
    rows = []
    for name, outcome in outcomes.items():
        policy, above = policies.get(name), above_full(test, outcome.losses(test))
        asked = policy if policy and policy.criterion else None
        shares = zip(test.loops, outcome.shares, strict=True)
        row: dict[str, Any] = {"policy": name}
        row |= {of: asked and getattr(asked, of) for of in ("criterion", *THRESHOLDS)}
        row |= {"last": policy and policy.fixed, "loss": outcome.loss}
        row |= {"above": above.mean, "low": above.low, "high": above.high}
        row |= {cost: getattr(outcome, cost) for cost in ("mean_loops", "heads", "multiply_adds")}
        row |= {"shares": " ".join(f"{loop}:{share:.4f}" for loop, share in shares)}
        row |= dict.fromkeys(("taken", "taken_above", "taken_low", "taken_high"))
        if policy:
            taken = taken_losses(model, data, test, policy)
            above = above_full(test, taken)
            row |= {"taken": float(taken.mean()), "taken_above": above.mean}
            row |= {"taken_low": above.low, "taken_high": above.high}
        rows.append(row)
    return rows


def policies_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Policy]:
    """The policies of rows of `judge_policies` by name; `chance` and the oracle are none.

    Raises InputError for rows that lack a column.
    """
    policies = {}
    for row in rows:
        if missing := {"policy", "taken", "criterion", "last", *THRESHOLDS}.difference(row):
            raise InputError(
                f"a table of policies has no column {min(missing)}; remove it, to be made again"
            )
        if row["taken"] is not None:
            given = {name: row[name] for name in THRESHOLDS if row[name] is not None}
            policies[row["policy"]] = Policy(row["criterion"], **given, fixed=row["last"])
    return policies


def known_policies(
    judged: Sequence[Mapping[str, Any]], choices: Choices | None
) -> dict[str, Policy]:
    """The policies of `judge_policies` by name; those that `crt generate` knows replace them.

    The one that it takes without options is GENERATE.
    """
    own = choices.policies() if choices else {}
    named = {GENERATE if name == AUTO else name: policy for name, policy in own.items()}
    return policies_of(judged) | {name: Policy(**policy) for name, policy in named.items()}


def promised_rows(choices: Choices | None, full: float) -> list[dict[str, Any]]:
    """The policies of `crt generate` as rows of `judge_policies`: what they lost on test, of which
    full depth's loss is `full` nats a token. Full depth itself is none of them.
    """
    ways = choices.ways.items() if choices else ()
    return [
        {"policy": f"crt generate --exit {name}", "criterion": way.policy.criterion}
        | {threshold: getattr(way.policy, threshold) for threshold in THRESHOLDS}
        | {"last": way.policy.fixed, "taken": full + way.paid, "taken_above": way.paid}
        | {"taken_low": way.paid_low, "taken_high": way.paid_high}
        for name, way in ways
        if way.draft_loop is None and way.paid is not None
    ]


def judged_row(
    rows: Sequence[Mapping[str, Any]], policy: Policy, loops: tuple[int, ...]
) -> Mapping[str, Any] | None:
    """The row of `judge_policies` whose policy does the same as `policy` to any text, if there is
    one. `loops`: those of the exits.
    """
    judged = policies_of(rows)
    alike = (name for name, own in judged.items() if _does(own, loops) == _does(policy, loops))
    name = next(alike, None)
    return next((row for row in rows if row["policy"] == name), None)


def _does(policy: Policy, loops: tuple[int, ...]) -> Policy:
    """The policy that does the same as this one, with its exits and its last one named."""
    last = policy.fixed or loops[-1]
    asked = loops if policy.exits is None else policy.exits
    exits = tuple(loop for loop in loops if loop in asked and loop < last)
    if policy.criterion is None or not exits:
        return Policy(exits=(), fixed=last)
    return replace(policy, exits=exits, fixed=last)


def calibrate_taken(
    model: CRT, data: TokenizedCorpus, trace: Trace, criterion: str, allowed: float
) -> Policy:
    """As `crt_lib.exits.trace.calibrate`, but the promise holds with exits taken as in decoding.

    Then the context of a token has left too, which the trace does not show; its budget is lowered
    by what that loses besides, until the promise holds. Full depth if it does not in a few rounds.
    """
    budget = math.log1p(allowed)
    limit = apply_policy(trace, Policy()).loss + budget
    for _ in range(6):
        policy = calibrate(trace, criterion, math.expm1(budget))
        if policy.criterion is None:
            return policy
        over = float(taken_losses(model, data, trace, policy).mean()) - limit
        if over <= 0:
            return policy
        budget -= over
    return Policy()


def taken_losses(model: CRT, data: TokenizedCorpus, trace: Trace, policy: Policy) -> np.ndarray:
    """Nats of each token of `trace` (N,), with exits taken as in decoding."""
    if policy.criterion is None:  # all tokens leave at one exit: as the trace has it
        return apply_policy(trace, policy).losses(trace).astype(np.float64)
    ids = data.split(trace.about["split"]).ids[: len(trace.loss)]
    eot = data.tokenizer.eot_id
    return evaluate_with_exits(model, ids, eot, policy, seq_len=trace.seq_len)
