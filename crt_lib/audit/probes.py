"""Probes: each asks in another way what a model's logits depend on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from crt_lib.audit.asking import Asked, Logits, NotAsked, largest_difference, parameters_of
from crt_lib.cached.memory import Memory
from crt_lib.model import CRT

NOISE = 1e-5  # of the largest influence: below it is rounding, as of a causal filter by FFT
SHAPE_NOISE = 1e-3  # of the largest logit: inputs of other shapes are added in another order
REDUCED_LOSS = 1e-2  # share of a cross-entropy: losses are averaged, and rounded, in many ways


@dataclass(frozen=True)
class Finding:
    """What one probe saw at one exit.

    `influence` (T, K): how far the logits at position t move for what is at position `columns[k]`;
    for the probes of cuts, for all from there on. It leaks where that is above `tolerance` and the
    column is at least t + `ahead`.
    """

    influence: Tensor
    tolerance: float
    columns: Tensor
    ahead: int | None = 1  # 0 for labels, whose j-th may be token j + 1; None: none may move any

    @property
    def pairs(self) -> Tensor:
        """The leaking pairs (t, j), (n, 2)."""
        t, k = ((self.influence > self.tolerance) & self.forbidden()).nonzero().T
        return torch.stack([t, self.columns[k]], 1)

    @property
    def offsets(self) -> tuple[int, int] | None:
        """The smallest and the largest distance from t to a later token that it sees, or None."""
        if self.ahead is None:
            return None
        distances = [j - t + 1 - self.ahead for t, j in self.pairs.tolist()]
        return (min(distances), max(distances)) if distances else None

    @property
    def largest(self) -> float:
        """The largest influence that should be none."""
        return float(self.influence.masked_fill(~self.forbidden(), 0.0).max())

    def forbidden(self) -> Tensor:
        """Which of `influence` should be none."""
        if self.ahead is None:
            return torch.ones_like(self.influence, dtype=torch.bool)
        return self.columns - torch.arange(len(self.influence))[:, None] >= self.ahead


def findings(
    influence: dict[int, Tensor],
    noise: float = NOISE,
    of: Logits | None = None,
    columns: Tensor | None = None,
    ahead: int | None = 1,
) -> dict[int, Finding]:
    """Findings above `noise` as a share of the largest finite size `of` each exit."""
    found = {}
    for loop, matrix in influence.items():
        finite = (of or influence)[loop].nan_to_num(0.0, 0.0, 0.0)
        own = torch.arange(matrix.shape[1]) if columns is None else columns
        found[loop] = Finding(matrix, noise * float(finite.abs().max()), own, ahead)
    return found


def shape_noise(asked: Asked) -> float:
    """The share of the largest logit that calls of another shape may round differently."""
    return max(SHAPE_NOISE, 8 * asked.spacing)


def rounding(logits: Logits) -> float:
    """The relative spacing of the numbers of the logits' type."""
    kinds = (torch.result_type(x, 1.0) for x in logits.values())  # they may be integers
    return max(torch.finfo(kind).eps for kind in kinds)


def _of_each(asked: Asked, ask: Callable[[Tensor], Logits] | None = None) -> dict[int, Tensor]:
    """By exit (T, T): how far the logits move for another token, or what `ask` makes of it."""
    ids = asked.ids
    at = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    each = torch.where(at, asked.others(ids, seed=1), ids)
    return {loop: moved.T for loop, moved in asked.differences(ids, each, ask).items()}


def tokens(asked: Asked) -> dict[int, Finding]:
    return findings(_of_each(asked))


def training(asked: Asked) -> dict[int, Finding]:
    model = asked.model
    if not isinstance(model, nn.Module):
        raise NotAsked("a function has no training mode")

    def stateless(ids: Tensor) -> Any:
        return functional_call(model, {name: b.clone() for name, b in model.named_buffers()}, ids)

    alone = replace(asked, model=stateless, one_by_one=True)
    model.train()
    try:
        once, again = alone(asked.ids), alone(asked.ids)
        if any(largest_difference(logits, again[loop]).any() for loop, logits in once.items()):
            raise NotAsked("in training its random numbers cannot be seeded")
        return tokens(alone)
    finally:
        model.eval()


@torch.enable_grad()
def gradient(asked: Asked) -> dict[int, Finding]:
    model, ids = asked.model, asked.ids
    if not isinstance(model, nn.Module):
        raise NotAsked("a function has no embedding to take gradients to")
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if seen or not args or not torch.is_tensor(args[0]) or not torch.equal(args[0], ids):
            return None
        seen.append(output.detach().clone().requires_grad_())
        return seen[0].clone()  # which the model may change in place

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        every = asked(ids)
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
        influence[loop] = torch.stack([largest_difference(g[0], 0 * g[0]) for g in gradients])
    return findings(influence)


def prefix(asked: Asked) -> dict[int, Finding]:
    T = asked.ids.shape[1]
    return _shortened(asked, asked.ids, range(1, T), {"lengths": f"1 to {T} tokens"})


def lengths(asked: Asked) -> dict[int, Finding]:
    row = asked.long_row(seed=4)
    C = row.shape[1]
    ends = sorted({asked.ids.shape[1], C // 4, C // 2, C * 5 // 8 | 1, C - 1} - {0, C})
    return _shortened(asked, row, ends, {"long lengths": ", ".join(map(str, ends))})


def decode(asked: Asked) -> dict[int, Finding]:
    if asked.random:
        raise NotAsked("its cache and its forward pass have other random numbers")
    here = (slice(t, t + 1) for t in range(asked.ids.shape[1] - 1))
    return _without_the_rest(asked, asked.ids, zip(here, _one_by_one(asked), strict=False))


def _shortened(
    asked: Asked, row: Tensor, ends: Iterable[int], covered: dict[str, str]
) -> dict[int, Finding]:
    if asked.random:
        raise NotAsked("with another length it has other random numbers")
    found = _without_the_rest(asked, row, ((slice(0, t), asked(row[:, :t])) for t in ends))
    asked.covered |= covered
    return found


def _without_the_rest(
    asked: Asked, ids: Tensor, given: Iterable[tuple[slice, Logits]]
) -> dict[int, Finding]:
    """`given`: positions, and their logits where no token after them has been seen."""
    whole, length = asked(ids), ids.shape[1]
    apart = {loop: torch.zeros(length, length) for loop in whole}
    for here, every in given:
        for loop, logits in every.items():
            apart[loop][here, here.stop] = largest_difference(logits[0], whole[loop][0, here])
    return findings(apart, shape_noise(asked), whole)


def _one_by_one(asked: Asked) -> Iterator[Logits]:
    """The logits of one token after another, from the model's own cache."""
    model, ids = asked.model, asked.ids
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
    elif {"past_key_values", "use_cache"} <= parameters_of(model):
        cache = None
        for token in ids.split(1, 1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield {0: output.logits}
    else:
        raise NotAsked("it takes no cache")


def padding(asked: Asked) -> dict[int, Finding]:
    """With padding on the left, masked, and positions counted from the first token, as generation
    gives them.
    """
    takes = parameters_of(asked.model)
    if "attention_mask" not in takes:
        raise NotAsked("it takes no attention mask")
    if asked.random:
        raise NotAsked("with padding it has other random numbers")
    ids, pads = asked.ids[:, :-3], asked.ids[:, -3:]  # as long as the row is
    mask = torch.ones_like(asked.ids)
    mask[:, :3] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    given = {name: value for name, value in given.items() if name in takes}
    whole, padded = asked(ids), asked(torch.cat([pads, ids], 1), given=given)
    apart = {k: largest_difference(x[0], padded[k][0, 3:])[:, None] for k, x in whole.items()}
    return findings(apart, shape_noise(asked), whole, ahead=None)


def labels(asked: Asked) -> dict[int, Finding]:
    name = min(parameters_of(asked.model) & {"labels", "targets"}, default=None)
    if name is None:
        raise NotAsked("it takes no labels")
    ids = asked.ids

    def ask(labels: Tensor) -> Logits:
        return asked(ids.expand(len(labels), -1), given={name: labels})

    given = ask(ids)
    if any(x.ndim != 3 or x.shape[:2] != ids.shape for x in given.values()):
        return _label_losses(asked, name, given)
    return findings(_of_each(asked, ask), of=given, ahead=0)


def _label_losses(asked: Asked, name: str, given: Logits) -> dict[int, Finding]:
    """A loss below the cross-entropy of the logits without labels comes from the labels."""
    found, ids = {}, asked.ids
    for loop, every in asked(ids).items():
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
        found[loop] = Finding(influence, tolerance, torch.arange(ids.shape[1]), ahead=0)
    return found
