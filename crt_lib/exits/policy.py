"""When a token may exit: criteria, the decaying threshold of eq. 6, and decoding with exits.

A criterion is a function of `Loop`, what is known after a loop, to a score in [0, 1] for each
token; a token leaves after the first exit loop whose score reaches the threshold.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import Product, wide_on_cpu
from crt_lib.cached.step import Step, Window
from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT


@dataclass
class Loop:
    """What a criterion may look at after loop `number`; what it asks for is computed once.

    States are (B, n, d), and (B, d) where a `Step` computes them: then there is no n below.
    """

    run: Window | Step
    number: int
    z: Tensor  # the state after the loop
    z_before: Tensor  # the state before it
    previous: "Loop | None"  # the exit loop before, if any

    @cached_property
    def logits(self) -> Tensor:
        """(B, n, V) of the loop's own head; without one, of the next loop's that has one."""
        features, vocabulary = self.run.readout(nearest_head(self.run.model, self.number), self.z)
        return vocabulary(features)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """(B, n, V), in float32 or wider."""
        return at_least_float32(self.logits).log_softmax(-1)

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """The two largest probabilities and their tokens, each (B, n, 2)."""
        tokens = self.logits.topk(2, dim=-1).indices
        return self.log_probabilities.gather(-1, tokens).exp(), tokens

    def losses(self, targets: Tensor) -> Tensor:
        """Nats (B, n) of `targets` (B, n)."""
        return nats_of(self.log_probabilities, targets)


def nearest_head(model: CRT, loop: int) -> int:
    """The loop of the head that reads the state after `loop`: its own, else the next, or last."""
    return next((own for own in model.config.head_loops if own >= loop), model.config.n_loops)


def nats_of(log_p: Tensor, targets: Tensor) -> Tensor:
    """The losses (B, n) of targets (B, n) by log-probabilities (B, n, V)."""
    return -log_p.gather(-1, targets[..., None])[..., 0]


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats (...), at least 0, of log-probabilities (..., V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def full_pass(model: CRT, ids: Tensor, n_loops: int | None = None) -> Iterator[Loop]:
    """What is known after each loop of all tokens `ids` (B, T), without exits.

    `n_loops` may be more than the model was trained with; loops past the last have its encoding.
    """
    run, seen = Window(model), None
    z = run.begin(ids)
    for number in range(1, (n_loops or model.config.n_loops) + 1):
        before, z = z, run.loop(min(number, model.config.n_loops), z)
        here = Loop(run, number, z, before, seen)
        yield here
        here.previous = None  # its logits are of no more use
        if number in model.config.head_loops:
            seen = here


@dataclass(frozen=True)
class Criterion:
    """A score (B, n) in [0, 1], high where a token may exit, and the heads it asks."""

    score: Callable[[Loop], Tensor]
    heads: int = 1  # vocabulary heads computed to ask once; that of the exit is computed anyway
    compares: bool = False  # also the head of the exit before, if it was not asked there
    of_rows: Callable[[Loop], list[float]] | None = None  # of states (B, d) on a CPU, in less time


def confidence(loop: Loop) -> Tensor:
    """The largest probability (eq. 6)."""
    return loop.log_probabilities.amax(-1).exp()


def margin(loop: Loop) -> Tensor:
    """The largest probability minus the second."""
    return loop.top[0][..., 0] - loop.top[0][..., 1]


def certainty(loop: Loop) -> Tensor:
    """1 - entropy / log V."""
    log_p = loop.log_probabilities
    return 1 + (log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])


def similarity(loop: Loop) -> Tensor:
    """The cosine of the states before and after the loop, where negative 0."""
    z, before = at_least_float32(loop.z), at_least_float32(loop.z_before)
    return F.cosine_similarity(z, before, dim=-1).clamp(min=0)


def _similarities(loop: Loop) -> list[float]:
    a, b = loop.z_before.numpy(), loop.z.numpy()  # a call of numpy's takes a third of torch's
    between, norms = np.vecdot(a, b), np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))
    return (np.maximum(between, 0) / np.maximum(norms, 1e-8)).tolist()


def gate(loop: Loop) -> Tensor:
    """exp(-KL), the KL that the model's trained gate expects between full depth and this exit."""
    if loop.run.model.gate is None:
        raise InputError("this model has no trained exit gate; `crt gate` fits one to a run")
    return torch.exp(-(loop.run.model.gate.distance(loop.number, loop.z) ** 2))


def stability(loop: Loop) -> Tensor:
    """exp(-KL(this exit || the exit before)); 0 at the first exit."""
    if loop.previous is None:
        return loop.z.new_zeros(loop.z.shape[:-1])
    return torch.exp(-divergence(loop.log_probabilities, loop.previous.log_probabilities))


def agreement(loop: Loop) -> Tensor:
    """1 where the best token is that of the exit before, else 0; 0 at the first exit."""
    if loop.previous is None:
        return loop.z.new_zeros(loop.z.shape[:-1])
    return (loop.top[1][..., 0] == loop.previous.top[1][..., 0]).float()


CRITERIA = {
    "confidence": Criterion(confidence),
    "margin": Criterion(margin),
    "certainty": Criterion(certainty),
    "similarity": Criterion(similarity, heads=0, of_rows=_similarities),
    "gate": Criterion(gate, heads=0),
    "stability": Criterion(stability, compares=True),
    "agreement": Criterion(agreement, compares=True),
}


@dataclass(frozen=True)
class Policy:
    """Which tokens leave where: a criterion and eq. 6, tau = max(tau_min, tau0 * decay**step).

    `step` counts loops from 0. `exits`: the loops at which tokens may exit by the criterion; None:
    all that have a head. After the loop `fixed`, if given, every token that is left leaves.
    """

    criterion: str | None = None
    tau0: float = 0.92
    tau_min: float = 0.8
    decay: float = 0.98
    exits: tuple[int, ...] | None = None
    fixed: int | None = None

    def __post_init__(self) -> None:
        if self.exits is not None:  # a list where it was read from JSON
            object.__setattr__(self, "exits", tuple(self.exits))
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise InputError(f"criterion {self.criterion!r} is not one of {', '.join(CRITERIA)}")
        for name in ("tau0", "tau_min", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.tau_min > self.tau0:
            raise InputError(
                f"tau_min {self.tau_min} is above tau0 {self.tau0}; the threshold only falls"
            )

    @property
    def asks(self) -> bool:
        """Whether exits before the last are asked whether tokens leave."""
        return self.criterion is not None

    def threshold(self, loop: int) -> float:
        """Of exit `loop` (eq. 6)."""
        return max(self.tau_min, self.tau0 * self.decay ** (loop - 1))

    def passes(self, loop: Loop) -> Tensor | bool:
        """Which tokens (B, n) may exit after this exit loop, or whether all or none may."""
        assert self.criterion is not None
        criterion, tau = CRITERIA[self.criterion], self.threshold(loop.number)
        if criterion.of_rows is not None and loop.z.ndim == 2 and wide_on_cpu(loop.z):
            some = [score >= tau for score in criterion.of_rows(loop)]
            return some[0] if len(set(some)) == 1 else torch.tensor(some)
        passes = criterion.score(loop) >= tau
        return passes if passes.any() else False


def exits_of(policy: Policy, config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """The loops that ask the criterion, and the last; InputError for one that has no head."""
    asked = policy.exits if policy.exits is not None else config.head_loops
    last = policy.fixed if policy.fixed is not None else config.n_loops
    for loop in (*asked, last):
        if loop not in config.head_loops:
            raise InputError(f"loop {loop} has no head; loops with one are {config.head_loops}")
    return asked if policy.asks else (), last


@dataclass(frozen=True)
class Exited:
    """Logits (B, n, V) of each token's own exit, and that exit's loop (B, n); no n by a `Step`."""

    logits: Tensor
    loops: Tensor


Own = dict[Product | None, tuple[Tensor, Tensor | None]]  # by vocabulary: features, whose they are


def leave(run: Window | Step, ids: Tensor, policy: Policy) -> Exited:
    """Tokens `ids` (B, n), or (B,) for a `Step`, with exits, after what the memory of `run` holds.

    A token that leaves after loop k gets the logits of its head, and all deeper loops find there
    what loop k left. However the tokens are split over calls, the logits are the same.
    """
    allowed, final = exits_of(policy, run.model.config)
    z = run.begin(ids)
    loops = torch.full(z.shape[:-1], final, device=z.device)
    active: Tensor | None = None  # all
    found: Own = {}
    seen: Loop | None = None
    for number in range(1, final + 1):
        before, z = z, run.loop(number, z)
        if number not in run.model.config.head_loops:
            continue
        seen = Loop(run, number, z, before, seen)
        passes = number == final or (number in allowed and policy.passes(seen))
        if passes is False:
            continue
        if passes is True:
            loops = loops.fill_(number) if active is None else torch.where(active, number, loops)
            _collect(found, seen, active)
            break
        leaving = passes if active is None else active & passes
        loops = torch.where(leaving, number, loops)
        if leaving[run.kept].any():
            _collect(found, seen, leaving)
        active = ~passes if active is None else active & ~passes
        if not active.any():
            break
        run.keep(active)
    run.end(number)
    logits = torch.empty(0)
    for vocabulary, (features, whose) in found.items():
        own = features if vocabulary is None else vocabulary(features)
        if len(logits) and whose is not None:
            own = torch.where(whose[..., None], own, logits)
        logits = own
    return Exited(logits, loops)


def _collect(found: Own, loop: Loop, leaving: Tensor | None) -> None:
    """Add the features of those that leave, None for all, or their logits if they were asked."""
    kept = loop.run.kept
    if "logits" in loop.__dict__:
        features, vocabulary = loop.logits[kept], None
    else:
        features, vocabulary = loop.run.readout(loop.number, loop.z[kept])
    if leaving is not None:
        leaving = leaving[kept]
        if vocabulary in found:  # one product for all exits that share a vocabulary
            others, before = found[vocabulary]
            assert before is not None  # else nobody was left
            features, leaving = torch.where(leaving[..., None], features, others), leaving | before
    found[vocabulary] = features, leaving


@torch.no_grad()
def run_with_exits(
    model: CRT, ids: Tensor, policy: Policy, memory: Memory | None = None, *, last: bool = False
) -> Exited:
    """`leave` for ids (B, n), or their embeddings, after what `memory` holds; None: nothing.

    `last`: only the logits of the last token, (B, 1, V). Raises InputError for no tokens at all.
    """
    rows, n = ids.shape[:2]
    if not rows * n:
        raise InputError(f"ids of shape {tuple(ids.shape)} are no tokens; give at least one")
    if memory is None:
        memory = Memory(model.config, rows, n, model.loop_encoding)
    return leave(Window(model, memory, last), ids, policy)
