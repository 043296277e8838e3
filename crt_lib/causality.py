"""Does a language model see the tokens it is asked to predict?

Each probe asks in another way, since each misses leaks that another finds: a filter with
wrap-around shows in evaluation, a batch norm over time only in training, a mean over what is there
only when the end is cut off. `causality_report` runs those that the model allows.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from crt_lib.evaluate import Model, device_of, logits_of
from crt_lib.files import InputError
from crt_lib.memory import Memory
from crt_lib.model import CRT

Logits = dict[int, Tensor]  # exit (0 for a model without exits) -> (B, T, V)
NOISE = 1e-5  # of the largest influence: below it is rounding, as of a causal filter by FFT
SHAPE_NOISE = 1e-3  # of the largest logit: inputs of other lengths are added in another order


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


@dataclass(frozen=True)
class CausalityReport:
    """The findings of each probe by exit, and why a probe was left out.

    `print` shows them as a table; `leaks` is the verdict.
    """

    findings: dict[str, dict[int, Finding]]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def leaks(self) -> bool:
        """Whether any probe found, at any exit, that logits depend on what comes later."""
        return any(len(found.pairs) for found in self._all())

    @property
    def first_leaking_offset(self) -> int | None:
        """The smallest j - t > 0 at which token j moves the logits at t; None when causal."""
        return min((found.offsets[0] for found in self._all() if found.offsets), default=None)

    @property
    def furthest_leaking_offset(self) -> int | None:
        """The largest j - t > 0 at which token j moves the logits at t; None when causal."""
        return max((found.offsets[1] for found in self._all() if found.offsets), default=None)

    @property
    def changes(self) -> dict[int, Tensor]:
        """The influence (T, T) of each token on each position, by exit, in evaluation mode."""
        return {loop: found.influence for loop, found in self.findings["tokens"].items()}

    def _all(self) -> Iterator[Finding]:
        for by_exit in self.findings.values():
            yield from by_exit.values()

    def __str__(self) -> str:
        head = f"{'probe':<10}{'exit':>5}{'leaking pairs':>15}{'nearest':>9}{'furthest':>10}"
        lines = [head + f"{'largest':>10}"]
        for name, by_exit in self.findings.items():
            for loop, found in by_exit.items():
                near, far = found.offsets or ("-", "-")
                worst = found.influence.triu(found.ahead).max().item()
                lines.append(
                    f"{name:<10}{loop:>5}{len(found.pairs):>15}{near:>9}{far:>10}{worst:>10.1e}"
                )
        lines += [f"{name:<10}not asked: {why}" for name, why in self.left_out.items()]
        lines.append("verdict: " + ("sees the future" if self.leaks else "causal"))
        return "\n".join(lines)


class NotAsked(Exception):
    """Why a probe does not apply to a model."""


def causality_report(
    model: Model, vocab_size: int, *, length: int = 24, seed: int = 0
) -> CausalityReport:
    """Which logits of `model` depend on which later tokens of a random row of `length`.

    `model`: a CRT, a causal language model of transformers, or any callable from ids (B, T) to
    logits (B, T, V), to `{exit: logits}` or to an object with `.logits`. A module is asked in
    evaluation mode, and is left as it was. The probes:

    - tokens: each token in turn is replaced;
    - training: the same in training mode, with the same random numbers, buffers restored;
    - gradient: of a random projection of the logits at each position to each token's embedding;
    - prefix: the end is cut off, at each position in turn;
    - decode: tokens come one by one, through the model's own cache;
    - labels: each label in turn is replaced, for a model that takes `labels` or `targets`.

    Raises InputError for a length below 2 and for a model whose logits differ between two equal
    calls, or do not have the shape (B, T, vocab_size or more).
    """
    if length < 2:
        raise InputError(f"the length is {length}; a later token needs at least 2")
    ids = _probe_ids(model, vocab_size, length, seed)
    findings: dict[str, dict[int, Finding]] = {}
    left_out: dict[str, str] = {}
    with _left_as_it_was(model):
        _set_training(model, False)
        _check(model, ids)
        for name, probe in PROBES.items():
            try:
                findings[name] = probe(model, ids, vocab_size)
            except NotAsked as why:
                left_out[name] = str(why)
    return CausalityReport(findings, left_out)


def _probe_ids(model: Model, vocab_size: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, length), generator=generator)
    return ids.to(device_of(model))


def _check(model: Model, ids: Tensor) -> None:
    with torch.no_grad():
        once, again = logits_of(model, ids), logits_of(model, ids)
    for loop, logits in once.items():
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"the model gives {given} for ids {tuple(ids.shape)}, not (B, T, V)")
        if not torch.equal(logits, again[loop]):
            raise InputError("the model gives other logits for the same ids: it is random")


@contextlib.contextmanager
def _left_as_it_was(model: Model) -> Iterator[None]:
    """Modes, buffers and the state of random numbers are put back."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)


def _set_training(model: Model, training: bool) -> None:
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
            moved[loop][:, j] = _largest(logits - base[loop])
    return moved


def _largest(difference: Tensor) -> Tensor:
    """Of each position of (1, T, V), as float32 on the CPU; what is not a number counts as one."""
    return difference[0].float().nan_to_num(nan=1.0, posinf=1.0).abs().amax(-1).cpu()


@torch.no_grad()
def _tokens(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    return _findings(_moves(partial(logits_of, model), ids, vocab_size))


def _findings(moved: dict[int, Tensor]) -> dict[int, Finding]:
    return {loop: Finding(matrix, NOISE * matrix.max().item()) for loop, matrix in moved.items()}


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

    _set_training(model, True)
    try:
        once, again = ask(ids), ask(ids)
        if any(not torch.equal(logits, again[loop]) for loop, logits in once.items()):
            raise NotAsked("in training its random numbers are not torch's")
        return _findings(_moves(ask, ids, vocab_size))
    finally:
        _set_training(model, False)


def _gradient(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    if not isinstance(model, nn.Module):
        raise NotAsked("a function has no embedding to take gradients to")
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
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
                influence[t] = _largest(own)
        found[loop] = Finding(influence, NOISE * influence.max().item())
    return found


@torch.no_grad()
def _prefix(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    length = ids.shape[1]
    whole = {loop: logits.clone() for loop, logits in logits_of(model, ids).items()}
    without: dict[int, Tensor] = {loop: torch.zeros(length, length) for loop in whole}
    for cut in range(1, length):
        for loop, logits in logits_of(model, ids[:, :cut]).items():
            without[loop][:cut, cut] = _largest(logits - whole[loop][:, :cut])
    return _against(without, whole)


def _against(without: dict[int, Tensor], whole: Logits) -> dict[int, Finding]:
    return {
        loop: Finding(matrix, SHAPE_NOISE * float(whole[loop].abs().max()))
        for loop, matrix in without.items()
    }


@torch.no_grad()
def _decode(model: Model, ids: Tensor, vocab_size: int) -> dict[int, Finding]:
    whole = {loop: logits.clone() for loop, logits in logits_of(model, ids).items()}
    length = ids.shape[1]
    steps = {loop: torch.zeros(length, length) for loop in whole}
    step = _stepper(model, length)
    for t in range(length - 1):
        for loop, logits in step(ids[:, t : t + 1]).items():
            steps[loop][t, t + 1] = _largest(logits - whole[loop][:, t : t + 1])[0]
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
        raise NotAsked(f"with {name} it gives losses")
    moved = _moves(lambda labels: logits_of(model, ids, **{name: labels}), ids, vocab_size)
    scale = {loop: float(logits.abs().max()) for loop, logits in given.items()}
    return {loop: Finding(m, NOISE * scale[loop], ahead=0) for loop, m in moved.items()}


PROBES = {
    "tokens": _tokens,
    "training": _training,
    "gradient": _gradient,
    "prefix": _prefix,
    "decode": _decode,
    "labels": _labels,
}
