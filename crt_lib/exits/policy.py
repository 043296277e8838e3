"""When a token may exit: criteria, the decaying threshold of eq. 6, and exits of a whole window.

A criterion is a function of `Loop`, what is known after a loop, to a score in [0, 1] for each
token; a token leaves after the first exit loop whose score reaches the threshold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.files import InputError
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT


@dataclass
class Loop:
    """What a criterion may look at after exit loop `number`; what it asks for is computed once."""

    model: CRT
    number: int
    z: Tensor  # (B, n, d), the state after the loop
    z_before: Tensor  # (B, n, d), the state before it
    previous: "Loop | None"  # the exit loop before, if any
    step: Step | None = None  # that computed it: then there is no n, one token a row

    @cached_property
    def logits(self) -> Tensor:
        """(B, n, V) of the loop's own head."""
        if self.step is not None:
            features, vocabulary = self.step.readout(self.number, self.z)
            return vocabulary(features)
        return F.linear(*self.model.readout(self.number, self.z))

    def logits_of(self, positions: slice) -> Tensor:
        """(B, k, V) of some positions; not computed again where a criterion has asked for all."""
        if "logits" in self.__dict__:
            return self.logits[:, positions]
        return F.linear(*self.model.readout(self.number, self.z[:, positions]))

    @cached_property
    def log_probabilities(self) -> Tensor:
        """(B, n, V), in float32 or wider."""
        return at_least_float32(self.logits).log_softmax(-1)

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """The two largest probabilities and their tokens, each (B, n, 2)."""
        tokens = self.logits.topk(2, dim=-1).indices
        return self.log_probabilities.gather(-1, tokens).exp(), tokens


Score = Callable[[Loop], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A named score (B, n) in [0, 1], high where a token may exit, and the heads it asks.

    `heads`: vocabulary heads that must be computed for a token to ask once; the head of the exit
    it leaves by is computed anyway. `compares`: also the head of the exit before, if it was not
    asked there.
    """

    name: str
    heads: int
    score: Score
    compares: bool = False


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


def gate(loop: Loop) -> Tensor:
    """exp(-KL), the KL that the model's trained gate expects between full depth and this exit."""
    if loop.model.gate is None:
        raise InputError("this model has no trained exit gate; `crt gate` fits one to a run")
    return torch.exp(-(loop.model.gate.distance(loop.number, loop.z) ** 2))


def stability(loop: Loop) -> Tensor:
    """exp(-KL(this exit || the exit before)); 0 at the first exit."""
    if loop.previous is None:
        return torch.zeros(loop.z.shape[:-1], device=loop.z.device)
    log_p, log_q = loop.log_probabilities, loop.previous.log_probabilities
    return torch.exp(-(log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))


def agreement(loop: Loop) -> Tensor:
    """1 where the best token is that of the exit before, else 0; 0 at the first exit."""
    if loop.previous is None:
        return torch.zeros(loop.z.shape[:-1], device=loop.z.device)
    return (loop.top[1][..., 0] == loop.previous.top[1][..., 0]).float()


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("confidence", 1, confidence),
        Criterion("margin", 1, margin),
        Criterion("certainty", 1, certainty),
        Criterion("similarity", 0, similarity),
        Criterion("gate", 0, gate),
        Criterion("stability", 1, stability, compares=True),
        Criterion("agreement", 1, agreement, compares=True),
    )
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
    def leaves(self) -> bool:
        """Whether any token may exit before the last loop."""
        return self.criterion is not None or self.fixed is not None

    def threshold(self, loop: int) -> float:
        """Of exit `loop` (eq. 6)."""
        return max(self.tau_min, self.tau0 * self.decay ** (loop - 1))

    def passes(self, loop: Loop) -> Tensor:
        """Which tokens (B, n) may exit after this exit loop; the policy has a criterion."""
        assert self.criterion is not None
        return CRITERIA[self.criterion].score(loop) >= self.threshold(loop.number)


@dataclass(frozen=True)
class Exited:
    """Logits (B, n, V) of each token's own exit, and that exit's loop (B, n)."""

    logits: Tensor
    loops: Tensor


def exits_of(policy: Policy, config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """The loops that ask the criterion, and the last; InputError for one that has no head."""
    asked = policy.exits if policy.exits is not None else config.head_loops
    last = policy.fixed if policy.fixed is not None else config.n_loops
    for loop in (*asked, last):
        if loop not in config.head_loops:
            raise InputError(f"loop {loop} has no head; loops with one are {config.head_loops}")
    return asked if policy.criterion is not None else (), last


@torch.no_grad()
def run_with_exits(
    model: CRT, ids: Tensor, policy: Policy, memory: Memory | None = None, *, last: bool = False
) -> Exited:
    """Tokens `ids` (B, n), or their embeddings, with exits, after what `memory` holds.

    A token that leaves after loop k gets the logits of its head, and all deeper loops find there
    what loop k left. One function of the input: however the tokens are split over calls, the
    logits are the same. `last`: only the logits of the last token, (B, 1, V). Raises InputError
    for no tokens at all.
    """
    rows, n = ids.shape[:2]
    if not rows * n:
        raise InputError(f"ids of shape {tuple(ids.shape)} are no tokens; give at least one")
    if memory is None:
        memory = Memory(model.config, rows, n, model.loop_encoding)
    allowed, final = exits_of(policy, model.config)
    start = memory.length
    z, embedded = model.begin(ids, memory)
    active = torch.ones(rows, n, dtype=torch.bool, device=ids.device)
    loops = torch.full((rows, n), final, device=ids.device)
    keep = slice(n - 1, n) if last else slice(0, n)
    logits: Tensor | None = None
    seen: Loop | None = None
    staying = rows * n
    for number in range(1, final + 1):
        layer = memory.loops[number - 1]
        if number > 1:
            before = memory.loops[number - 2]
            layer.catch_up(before, start)
            layer.follow(before, None if staying == rows * n else active)
        after = model.apply_loop(number, z, embedded, layer)
        here = Loop(model, number, after, z, seen)
        z = after if staying == rows * n else torch.where(active[..., None], after, z)
        if number == final:
            leaving, count = active, staying
        elif number in allowed:
            leaving = active & policy.passes(here)
            count = int(leaving.sum())
        else:
            count = 0
        if number in model.config.head_loops:
            seen = here
        if not count:
            continue
        if count == rows * n or leaving[:, keep].any():
            own = here.logits_of(keep)
            # tokens that stay get theirs later
            logits = own if logits is None else torch.where(leaving[:, keep, None], own, logits)
        loops = torch.where(leaving, number, loops)
        staying -= count
        if not staying:
            break
        active = active & ~leaving
    assert logits is not None  # every token leaves, at the last loop if not before
    return Exited(logits, loops)


def evaluate_with_exits(
    model: CRT,
    ids: np.ndarray,
    eot_id: int,
    policy: Policy,
    *,
    seq_len: int,
    batch_size: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's nats (honest protocol) with exits taken as in decoding, and its exit loop.

    Unlike a trace's, the context of a token has left too where the policy let it.
    """
    nats, loops = np.empty(len(ids)), np.empty(len(ids), np.int64)
    device, begin = model.loop_encoding.device, 0
    was_training = model.training
    model.eval()
    try:
        for batch in evaluation_windows(ids, seq_len, batch_size, eot_id):
            targets = batch.targets.to(device)
            exited = run_with_exits(model, batch.inputs.to(device), policy)
            scored = targets != NOT_SCORED
            losses = F.cross_entropy(
                at_least_float32(exited.logits).flatten(0, 1), targets.flatten(), reduction="none"
            )
            here = slice(begin, begin := begin + int(scored.sum()))
            nats[here] = losses.view(targets.shape)[scored].double().cpu().numpy()
            loops[here] = exited.loops[scored].cpu().numpy()
    finally:
        model.train(was_training)
    return nats, loops
