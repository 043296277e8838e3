"""Exits of one new token a row, as decoding takes them: few operations, and one head at the end."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.cached.products import wide_on_cpu
from crt_lib.cached.step import Step
from crt_lib.exits.policy import Loop, Policy, exits_of

Ask = Callable[[int, Tensor, Tensor], list[float]]
Left = tuple[list[bool], Tensor, Callable[[Tensor], Tensor]]  # rows, features, what makes logits


def step_with_exits(step: Step, ids: Tensor, policy: Policy) -> tuple[Tensor, list[int]]:
    """As `run_with_exits`, of one token a row: ids (B,) to logits (B, V), and the loops of exit."""
    model, rows = step.model, step.rows
    allowed, final = exits_of(policy, model.config)
    ask = _quick(step, policy.criterion) if allowed and policy.criterion else None
    z = step.begin(ids, final)
    active, loops = [True] * rows, [final] * rows
    seen: Loop | None = None
    left: list[Left] = []
    for number in range(1, final + 1):
        before, z = z, step.loop(number, z)
        leaving, here = active, None
        if number < final:
            if ask is None and allowed and number in model.config.head_loops:
                here = seen = Loop(model, number, z, before, seen, step)
            if number not in allowed:
                continue
            if here is not None:
                passes = policy.passes(here).tolist()
            elif ask is not None:
                tau = policy.threshold(number)
                passes = [score >= tau for score in ask(number, before, z)]
            leaving = [a and p for a, p in zip(active, passes, strict=True)]
            if True not in leaving:
                continue
        if here is not None and "logits" in here.__dict__:
            left.append((leaving, here.logits, _as_it_is))
        else:
            left.append((leaving, *step.readout(number, z)))
        loops = [number if leaves else loop for leaves, loop in zip(leaving, loops, strict=True)]
        active = [a and not leaves for a, leaves in zip(active, leaving, strict=True)]
        if True not in active:
            break
        step.keep(torch.tensor(active, device=z.device))
    step.end(number, settle=bool(allowed))
    return _own_logits(left), loops


def _quick(step: Step, criterion: str) -> Ask | None:
    """(loop, state before, state after) to the scores of a criterion that asks no head."""
    if criterion not in step.asked:
        step.asked[criterion] = None
        if criterion == "similarity":
            step.asked[criterion] = _similarities
        elif criterion == "gate" and step.model.gate is not None:
            distances = step.model.gate.asker()
            step.asked[criterion] = lambda loop, _, z: [
                math.exp(-(d**2)) for d in distances(loop, z)
            ]
    return step.asked[criterion]


def _similarities(loop: int, before: Tensor, z: Tensor) -> list[float]:
    if not wide_on_cpu(z):
        return F.cosine_similarity(z.float(), before.float(), dim=-1).clamp(min=0).tolist()
    a, b = before.numpy(), z.numpy()  # a call of numpy's takes a third of torch's
    between, norms = np.vecdot(a, b), np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))
    return (np.maximum(between, 0) / np.maximum(norms, 1e-8)).tolist()


def _own_logits(left: list[Left]) -> Tensor:
    """(B, V) from who left at each exit, its features, and what makes them logits."""
    logits: Tensor | None = None
    while left:
        leaving, features, make = left.pop(0)
        while left and left[0][2] is make:  # one product for all exits that share a vocabulary
            later, others, _ = left.pop(0)
            features = torch.where(_column(later, features), others, features)
            leaving = [a or b for a, b in zip(leaving, later, strict=True)]
        own = make(features)
        logits = own if logits is None else torch.where(_column(leaving, own), own, logits)
    assert logits is not None  # every row leaves, at the last loop if not before
    return logits


def _column(rows: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)[:, None]


def _as_it_is(x: Tensor) -> Tensor:
    return x
