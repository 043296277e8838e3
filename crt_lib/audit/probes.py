"""Probes: each asks in another way what a model's logits depend on."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.cached.memory import Memory
from crt_lib.evaluate import Model, device_of, logits_of
from crt_lib.files import InputError
from crt_lib.model import CRT

Logits = dict[int, Tensor]  # exit (0 for a model without exits) -> (B, T, V)
NOISE = 1e-5  # of the largest influence: below it is rounding, as of a causal filter by FFT
SHAPE_NOISE = 1e-3  # of the largest logit: inputs of other lengths are added in another order
FAR = 512  # tokens of the probe `far`, where the model has as many positions
REDUCED_LOSS = 1e-2  # share of a cross-entropy: losses are averaged, and rounded, in many ways


@dataclass(frozen=True)
class Finding:
    """What one probe saw at one exit.

    `influence` (T, T): how far the logits at position t move for what is at position j; for the
    probes `prefix` and `decode`, for all that is there from j on. It leaks where that is above
    `tolerance` and j >= t + `ahead`: 1 for tokens, 0 for labels, whose j-th may be token j + 1.
    """

    influence: Tensor
    tolerance: float
    ahead: int = 1

    @property
    def pairs(self) -> Tensor:
        """The leaking pairs (t, j), (n, 2)."""
        return (self.influence > self.tolerance).triu(self.ahead).nonzero()

    @property
    def offsets(self) -> tuple[int, int] | None:
        """The smallest and the largest distance from t to a later token that it sees, or None."""
        if not len(self.pairs):
            return None
        distances = self.pairs[:, 1] - self.pairs[:, 0] + 1 - self.ahead
        return int(distances.min()), int(distances.max())


class NotAsked(Exception):
    """Why a probe does not apply to a model."""


def probe_ids(model: Model, vocab_size: int, length: int, seed: int) -> Tensor:
    """A random row (1, length) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, length), generator=generator)
    return ids.to(device_of(model))


def set_training(model: Model, training: bool) -> None:
    """The mode of a module; a function has none."""
    if isinstance(model, nn.Module):
        model.train(training)


def _moves(ask: Callable[[Tensor], Logits], values: Tensor, vocab_size: int) -> dict[int, Tensor]:
    """How far the logits at t move, largest over the vocabulary, when `values[0, j]` changes."""
    length = values.shape[1]
    generator = torch.Generator().manual_seed(1)
    shift = torch.randint(1, max(vocab_size, 2), (length,), generator=generator)
    base = {loop: logits.clone() for loop, logits in ask(values).items()}
    moved = {loop: torch.zeros(length, length) for loop in base}
    for j in range(length):
        other = values.clone()
        other[0, j] = (other[0, j] + int(shift[j])) % vocab_size
        for loop, logits in ask(other).items():
            moved[loop][:, j] = largest_difference(logits, base[loop])
    return moved


def largest_difference(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference at each position of (1, T, V), as float32 on the CPU.

    Infinite where one of two different values is; none between two equal infinities.
    """
    one, other = one[0].float(), other[0].float()
    apart = (one - other).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return apart.masked_fill(one == other, 0.0).amax(-1).cpu()


def _scale(values: Tensor) -> float:
    """The largest finite size among `values`."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@torch.no_grad()
def _tokens(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    return _findings(_moves(partial(logits_of, model), ids, vocab_size))


def _findings(moved: dict[int, Tensor]) -> dict[int, Finding]:
    return {loop: Finding(matrix, NOISE * _scale(matrix)) for loop, matrix in moved.items()}


@torch.no_grad()
def _training(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    if not isinstance(model, nn.Module):
        raise NotAsked("a function has no training mode")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def ask(row: Tensor) -> Logits:
        torch.manual_seed(0)
        for buffer, before in buffers:
            buffer.copy_(before)
        return logits_of(model, row)

    set_training(model, True)
    try:
        once, again = ask(ids), ask(ids)
        if any(largest_difference(logits, again[loop]).any() for loop, logits in once.items()):
            raise NotAsked("in training its random numbers are not torch's")
        return _findings(_moves(ask, ids, vocab_size))
    finally:
        set_training(model, False)


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
        with torch.enable_grad():
            every = logits_of(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen or not any(logits.requires_grad for logits in every.values()):
        raise NotAsked("no embedding of the ids leads to its logits")
    length = ids.shape[1]
    found = {}
    generator = torch.Generator().manual_seed(2)
    for loop, logits in every.items():
        direction = torch.randn(logits.shape[-1], generator=generator).to(logits)
        influence = torch.zeros(length, length)
        for t in range(length):
            (own,) = torch.autograd.grad(
                logits[0, t] @ direction, seen[0], retain_graph=True, allow_unused=True
            )
            if own is not None:
                influence[t] = largest_difference(own, torch.zeros_like(own))
        found[loop] = Finding(influence, NOISE * _scale(influence))
    return found


@torch.no_grad()
def _prefix(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    length = ids.shape[1]
    whole = {loop: logits.clone() for loop, logits in logits_of(model, ids).items()}
    without: dict[int, Tensor] = {loop: torch.zeros(length, length) for loop in whole}
    for cut in range(1, length):
        for loop, logits in logits_of(model, ids[:, :cut]).items():
            without[loop][:cut, cut] = largest_difference(logits, whole[loop][:, :cut])
    return _against(without, whole)


def _against(without: dict[int, Tensor], whole: Logits) -> dict[int, Finding]:
    found = {}
    for loop, matrix in without.items():
        rounding = torch.finfo(whole[loop].dtype).eps if whole[loop].is_floating_point() else 0.0
        noise = max(SHAPE_NOISE, 8 * rounding)
        found[loop] = Finding(matrix, noise * _scale(whole[loop]))
    return found


@torch.no_grad()
def _decode(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    whole = {loop: logits.clone() for loop, logits in logits_of(model, ids).items()}
    length = ids.shape[1]
    steps = {loop: torch.zeros(length, length) for loop in whole}
    step = _stepper(model, length)
    for t in range(length - 1):
        for loop, logits in step(ids[:, t : t + 1]).items():
            steps[loop][t, t + 1] = largest_difference(logits, whole[loop][:, t : t + 1])[0]
    return _against(steps, whole)


def _stepper(model: Model, length: int) -> Callable[[Tensor], Logits]:
    """A function of the next token, (1, 1), to its logits, from the model's own cache."""
    if isinstance(model, CRT):
        try:
            memory = Memory(model.config, 1, length, model.loop_encoding)
        except InputError as error:
            raise NotAsked("a model that sees the future has no cache") from error
        return partial(_crt_step, model, memory)
    parameters = _parameters_of(model)
    if "past_key_values" not in parameters or "use_cache" not in parameters:
        raise NotAsked("it takes no cache")
    cache = None

    def step(token: Tensor) -> Logits:
        nonlocal cache
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        return {0: output.logits}

    return step


def _crt_step(model: CRT, memory: Memory, token: Tensor) -> Logits:
    z, embedded = model.begin(token, memory)
    logits = {}
    for loop in range(1, model.config.n_loops + 1):
        z = model.apply_loop(loop, z, embedded, memory.loops[loop - 1])
        if loop in model.config.head_loops:
            features, weight = model.readout(loop, z)
            logits[loop] = features @ weight.T
    return logits


def _parameters_of(model: Model) -> set[str]:
    call = model.forward if isinstance(model, nn.Module) else model
    try:
        return set(inspect.signature(call).parameters)
    except ValueError:
        return set()


@torch.no_grad()
def _labels(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    names = _parameters_of(model) & {"labels", "targets"}
    if not names:
        raise NotAsked("it takes no labels")
    (name, *_) = sorted(names)
    given = logits_of(model, ids, **{name: ids})
    if any(x.ndim != 3 or x.shape[:2] != ids.shape for x in given.values()):
        return _label_losses(model, ids, name, given)
    moved = _moves(lambda labels: logits_of(model, ids, **{name: labels}), ids, vocab_size)
    return {
        loop: Finding(moved[loop], NOISE * _scale(logits), ahead=0)
        for loop, logits in given.items()
    }


def _label_losses(model: Model, ids: Tensor, name: str, given: Logits) -> dict[int, Finding]:
    """A loss below the cross-entropy of the logits without labels comes from the labels."""
    found, length = {}, ids.shape[1]
    for loop, logits in logits_of(model, ids).items():
        if loop not in given or given[loop].numel() != 1:
            raise NotAsked(f"with {name} it gives neither logits nor one loss")
        logits = logits[0].float()
        aligned = F.cross_entropy(logits, ids[0])
        shifted = F.cross_entropy(logits[:-1], ids[0, 1:])  # as transformers does it
        nearest = min((aligned, shifted), key=lambda loss: abs(float(loss - given[loop])))
        below = float(nearest - given[loop])
        tolerance = REDUCED_LOSS * float(nearest.abs())
        if below < -tolerance:
            raise NotAsked(f"with {name} it gives a loss that is no cross-entropy of its logits")
        found[loop] = Finding(max(below, 0.0) * torch.eye(length), tolerance, ahead=0)
    return found


@torch.no_grad()
def _far(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    """Of two halves: `influence` (2, 2) of what is in the second alone."""
    row = probe_ids(model, vocab_size, min(FAR, positions_of(model) or FAR), seed=3)
    half = row.shape[1] // 2
    if half < ids.shape[1] // 2:
        raise NotAsked("it has no more positions than the other probes use")
    other = row.clone()
    other[:, half:] = (other[:, half:] + 1) % vocab_size
    before = {loop: logits.clone() for loop, logits in logits_of(model, row).items()}
    found = {}
    for loop, logits in logits_of(model, other).items():
        moved = largest_difference(logits, before[loop])
        influence = torch.zeros(2, 2)
        influence[0, 1], influence[1, 1] = moved[:half].max(), moved[half:].max()
        found[loop] = Finding(influence, NOISE * _scale(influence))
    return found


def positions_of(model: Model) -> int | None:
    """How many positions the model's configuration allows, where it says so."""
    config = getattr(model, "config", None)
    names = ("max_seq_len", "n_positions", "max_position_embeddings", "block_size")
    return next((size for name in names if (size := getattr(config, name, None))), None)


PROBES = {
    "tokens": _tokens,
    "training": _training,
    "gradient": _gradient,
    "prefix": _prefix,
    "decode": _decode,
    "far": _far,
    "labels": _labels,
}
