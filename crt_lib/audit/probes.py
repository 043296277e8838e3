"""Probes: each asks in another way what a model's logits depend on."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from crt_lib.cached.memory import Memory
from crt_lib.evaluate import Model, device_of, logits_of
from crt_lib.model import CRT

Logits = dict[int, Tensor]  # exit (0 for a model without exits) -> (B, T, V)
NOISE = 1e-5  # of the largest influence: below it is rounding, as of a causal filter by FFT
SHAPE_NOISE = 1e-3  # of the largest logit: inputs of other lengths are added in another order
REDUCED_LOSS = 1e-2  # share of a cross-entropy: losses are averaged, and rounded, in many ways
FAR = 512  # tokens of the probe `far`, where the model has as many positions


@dataclass(frozen=True)
class Finding:
    """What one probe saw at one exit.

    `influence` (T, T): how far the logits at position t move for what is at position j; for the
    probes `prefix` and `decode`, for all from j on. It leaks where that is above `tolerance` and
    j >= t + `ahead`.
    """

    influence: Tensor
    tolerance: float
    ahead: int = 1  # 0 for labels, whose j-th may be token j + 1

    @property
    def pairs(self) -> Tensor:
        """The leaking pairs (t, j), (n, 2)."""
        return (self.influence > self.tolerance).triu(self.ahead).nonzero()

    @property
    def offsets(self) -> tuple[int, int] | None:
        """The smallest and the largest distance from t to a later token that it sees, or None."""
        distances = [j - t + 1 - self.ahead for t, j in self.pairs.tolist()]
        return (min(distances), max(distances)) if distances else None


class NotAsked(Exception):
    """Why a probe does not apply to a model."""


def probe_ids(model: Model, vocab_size: int, length: int, seed: int) -> Tensor:
    """A random row (1, length) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, length), generator=generator)
    return ids.to(device_of(model))


def positions_of(model: Model) -> int | None:
    """How many positions the model's configuration allows, where it says so."""
    config = getattr(model, "config", None)
    names = ("max_seq_len", "n_positions", "max_position_embeddings", "block_size")
    return next((size for name in names if (size := getattr(config, name, None))), None)


def _ask(model: Model, ids: Tensor, **labels: Tensor) -> Logits:
    """As `logits_of`, copied: a model may write its next ones into the same memory."""
    return {loop: logits.clone() for loop, logits in logits_of(model, ids, **labels).items()}


def largest_difference(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference at each position of (1, T, V), as float32 on the CPU.

    Infinite where one of two different values is; none between two equal infinities.
    """
    one, other = one[0].float(), other[0].float()
    apart = (one - other).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return apart.masked_fill(one == other, 0.0).amax(-1).cpu()


def _findings(
    influence: dict[int, Tensor], noise: float = NOISE, of: Logits | None = None, ahead: int = 1
) -> dict[int, Finding]:
    """Findings above `noise` as a share of the largest finite size `of` each exit."""
    found = {}
    for loop, matrix in influence.items():
        finite = (of or influence)[loop].nan_to_num(0.0, 0.0, 0.0)
        found[loop] = Finding(matrix, noise * float(finite.abs().max()), ahead)
    return found


def _moves(asked: Callable[[Tensor], Logits], values: Tensor, vocab_size: int) -> dict[int, Tensor]:
    """How far the logits at t move, largest over the vocabulary, when `values[0, j]` changes."""
    length = values.shape[1]
    generator = torch.Generator().manual_seed(1)
    shift = torch.randint(1, max(vocab_size, 2), (length,), generator=generator)
    base = asked(values)
    moved = {loop: torch.zeros(length, length) for loop in base}
    for j in range(length):
        other = values.clone()
        other[0, j] = (other[0, j] + int(shift[j])) % vocab_size
        for loop, logits in asked(other).items():
            moved[loop][:, j] = largest_difference(logits, base[loop])
    return moved


def _tokens(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    return _findings(_moves(partial(_ask, model), ids, vocab_size))


def _training(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    if not isinstance(model, nn.Module):
        raise NotAsked("a function has no training mode")

    def asked(row: Tensor) -> Logits:
        torch.manual_seed(0)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return _ask(partial(functional_call, model, buffers), row)

    model.train()
    try:
        once, again = asked(ids), asked(ids)
        if any(largest_difference(logits, again[loop]).any() for loop, logits in once.items()):
            raise NotAsked("in training its random numbers are not torch's")
        return _findings(_moves(asked, ids, vocab_size))
    finally:
        model.eval()


@torch.enable_grad()
def _gradient(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    if not isinstance(model, nn.Module):
        raise NotAsked("a function has no embedding to take gradients to")
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if seen or not args or not torch.is_tensor(args[0]) or not torch.equal(args[0], ids):
            return None
        seen.append(output.detach().clone().requires_grad_())
        return seen[0]

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        every = _ask(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen or not any(logits.requires_grad for logits in every.values()):
        raise NotAsked("no embedding of the ids leads to its logits")
    influence = {}
    generator = torch.Generator().manual_seed(2)
    for loop, logits in every.items():
        direction = torch.randn(logits.shape[-1], generator=generator).to(logits)
        gradients = (
            torch.autograd.grad(at @ direction, seen, retain_graph=True, materialize_grads=True)[0]
            for at in logits[0]
        )
        influence[loop] = torch.stack([largest_difference(g, 0 * g) for g in gradients])
    return _findings(influence)


def _prefix(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    ends = range(1, ids.shape[1])
    return _without_the_rest(model, ids, ((slice(0, t), _ask(model, ids[:, :t])) for t in ends))


def _decode(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    here = (slice(t, t + 1) for t in range(ids.shape[1] - 1))
    return _without_the_rest(model, ids, zip(here, _one_by_one(model, ids), strict=False))


def _without_the_rest(
    model: Model, ids: Tensor, given: Iterable[tuple[slice, Logits]]
) -> dict[int, Finding]:
    """`given`: positions, and their logits where no token after them has been seen."""
    whole, length = _ask(model, ids), ids.shape[1]
    apart = {loop: torch.zeros(length, length) for loop in whole}
    for here, every in given:
        for loop, logits in every.items():
            apart[loop][here, here.stop] = largest_difference(logits, whole[loop][:, here])
    # logits may be integers
    rounding = max(torch.finfo(torch.result_type(x, 1.0)).eps for x in whole.values())
    return _findings(apart, max(SHAPE_NOISE, 8 * rounding), whole)


def _one_by_one(model: Model, ids: Tensor) -> Iterator[Logits]:
    """The logits of one token after another, from the model's own cache."""
    if isinstance(model, CRT) and model.config.causal:
        memory = Memory(model.config, 1, ids.shape[1], model.loop_encoding)
        for token in ids.split(1, 1):
            z, embedded = model.begin(token, memory)
            logits = {}
            for loop, layer in enumerate(memory.loops, 1):
                z = model.apply_loop(loop, z, embedded, layer)
                if loop in model.config.head_loops:
                    logits[loop] = F.linear(*model.readout(loop, z))
            yield logits
    elif {"past_key_values", "use_cache"} <= _parameters_of(model):
        cache = None
        for token in ids.split(1, 1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield {0: output.logits}
    else:
        raise NotAsked("it takes no cache")


def _parameters_of(model: Model) -> set[str]:
    try:
        return set(inspect.signature(getattr(model, "forward", model)).parameters)
    except ValueError:
        return set()


def _labels(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    name = min(_parameters_of(model) & {"labels", "targets"}, default=None)
    if name is None:
        raise NotAsked("it takes no labels")

    def asked(labels: Tensor) -> Logits:
        return _ask(model, ids, **{name: labels})

    given = asked(ids)
    if any(x.ndim != 3 or x.shape[:2] != ids.shape for x in given.values()):
        return _label_losses(model, ids, name, given)
    return _findings(_moves(asked, ids, vocab_size), of=given, ahead=0)


def _label_losses(model: Model, ids: Tensor, name: str, given: Logits) -> dict[int, Finding]:
    """A loss below the cross-entropy of the logits without labels comes from the labels."""
    found = {}
    for loop, every in _ask(model, ids).items():
        if loop not in given or given[loop].numel() != 1:
            raise NotAsked(f"with {name} it gives neither logits nor one loss")
        logits, loss = every[0].float(), float(given[loop])
        aligned = float(F.cross_entropy(logits, ids[0]))
        shifted = float(F.cross_entropy(logits[:-1], ids[0, 1:]))  # as transformers does it
        nearest = min(aligned, shifted, key=lambda plain: abs(plain - loss))
        tolerance = REDUCED_LOSS * abs(nearest)
        if nearest - loss < -tolerance:
            raise NotAsked(f"with {name} it gives a loss that is no cross-entropy of its logits")
        influence = max(nearest - loss, 0.0) * torch.eye(ids.shape[1])
        found[loop] = Finding(influence, tolerance, ahead=0)
    return found


def _far(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    """`influence` (2, 2) of the second half on both."""
    row = probe_ids(model, vocab_size, min(FAR, positions_of(model) or FAR), seed=3)
    half = row.shape[1] // 2
    if half < ids.shape[1] // 2:
        raise NotAsked("it has no more positions than the other probes use")
    other = row.clone()
    other[:, half:] = (other[:, half:] + 1) % vocab_size
    before, influence = _ask(model, row), {}
    for loop, logits in _ask(model, other).items():
        moved = largest_difference(logits, before[loop])
        influence[loop] = torch.tensor([[0, moved[:half].max()], [0, moved[half:].max()]])
    return _findings(influence)


PROBES = {
    "tokens": _tokens,  # each token in turn is replaced
    "training": _training,  # the same in training mode, with the same random numbers and buffers
    "gradient": _gradient,  # of a random projection of each position's logits, to each embedding
    "prefix": _prefix,  # the end is cut off, at each position in turn
    "decode": _decode,  # tokens come one by one, through the model's own cache
    "far": _far,  # the second half of a row of up to FAR tokens is replaced
    "labels": _labels,  # each label in turn is replaced, for a model that takes them
}
