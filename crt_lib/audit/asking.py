"""How a model is asked: with the same random numbers at every call, a few rows at a time."""

import contextlib
import inspect
import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crt_lib.data import check_counts
from crt_lib.evaluate import Model, device_of, logits_of
from crt_lib.files import InputError

Logits = dict[int, Tensor]  # exit (0 for a model without exits) -> (B, T, V)
UNDECLARED = 512  # positions, where the model does not say how many it has
AT_MOST = 2048  # positions, where nobody asks for more
MOST_ROWS = 64  # of a call
LONGEST = 2**24  # positions that may be asked for
_POSITIONS = (  # how models call the longest row that they take
    *("max_seq_len", "n_positions", "max_position_embeddings", "block_size", "n_ctx"),
    *("context_length", "max_sequence_length", "seq_length", "seq_len", "max_len"),
)
_DIFFUSION = ("llada", "dream", "mdlm", "sedd", "bd3lm", "diffu")  # how their types begin


class NotAsked(Exception):
    """Why a probe does not apply to a model."""


@dataclass
class Asked:
    """A model that is asked, and what every probe needs to know of it."""

    model: Model
    ids: Tensor  # (1, T), the short row
    vocab_size: int
    context: int = 0  # positions of a long row; 0: no more than the short one has
    one_by_one: bool = False  # it takes one row at a time, or its rows see each other
    random: str = ""  # "", "seeded" or "own": whose its random numbers are
    spacing: float = 0.0  # relative, of the coarsest numbers that it computes with
    seconds: float = 10.0  # for what grows with the vocabulary and the context
    covered: dict[str, str] = field(default_factory=dict)  # what was asked, a line each

    def __call__(
        self, rows: Tensor, seed: int = 0, given: Mapping[str, Tensor] | None = None
    ) -> Logits:
        """As `logits_of`, copied: a model may write its next ones into the same memory."""
        parts = []
        for part in rows.split(1) if self.one_by_one else [rows]:
            _seed(seed)
            logits = _logits(self.model, part, given or {})
            parts.append({loop: x.clone() for loop, x in logits.items()})
        return _joined(parts)

    def differences(
        self,
        base: Tensor,
        rows: Tensor,
        ask: Callable[[Tensor], Logits] | None = None,
        seconds: float = math.inf,
        least: int = 0,
    ) -> dict[int, Tensor]:
        """By exit (N, T): how far the logits of N `rows` (., T) are from those of `base`.

        The largest over the vocabulary. `base` is one row, or one for each. A row stands where its
        base stood, in calls of one shape: a sound model's logits are then equal, bit by bit. All
        rows are asked, or, on a slow model, the `least` and those for which there are `seconds`.
        """
        ask, n = ask or self, self.at_once(len(rows), base.shape[1])
        bases, end = base.expand(len(rows), -1), time.monotonic() + seconds
        before, parts = ask(bases[:n]), []
        for start in range(0, len(rows), n):
            at = torch.arange(start, start + n, device=rows.device).clamp(max=len(rows) - 1)
            if start and len(base) > 1:
                before = ask(bases[at])
            after = ask(rows[at])
            parts.append({k: largest_difference(x, before[k]) for k, x in after.items()})
            if start + n >= least and time.monotonic() > end:
                break
        return {k: x[: len(rows)] for k, x in _joined(parts).items()}

    def at_once(self, rows: int, length: int) -> int:
        """How many rows of `length` fit in a call of about 16 MB of logits."""
        if self.one_by_one:
            return 1
        return max(1, min(rows, MOST_ROWS, 2**22 // (length * self.vocab_size), 2**13 // length))

    def row(self, length: int, seed: int) -> Tensor:
        """A random row (1, length)."""
        return random_ids(self.vocab_size, (1, length), seed).to(self.ids.device)

    def others(self, rows: Tensor, seed: int) -> Tensor:
        """Another token wherever `rows` have one."""
        shift = 1 + random_ids(max(self.vocab_size - 1, 1), tuple(rows.shape), seed)
        return (rows + shift.to(rows.device)) % self.vocab_size

    def long_row(self, seed: int) -> Tensor:
        """A random row of the whole context; raises NotAsked where the short one is as long."""
        if self.context <= self.ids.shape[1]:
            raise NotAsked("it has no more positions than the other probes use")
        return self.row(self.context, seed)


def check_numbers(
    length: object, vocab_size: object, context: object, seed: object, seconds: object
) -> None:
    """Raise InputError for a number that `causality_report` cannot ask with.

    Rows have 2 to 2**24 tokens, vocabularies at least 1; `context` and `vocab_size` may be None.
    """
    check_counts(2, LONGEST, length=length, context=2 if context is None else context)
    check_counts(1, 2**31 - 1, vocab_size=1 if vocab_size is None else vocab_size)
    check_counts(0, 2**32 - 1, seed=seed)
    if not isinstance(seconds, int | float | np.number) or not seconds >= 0:
        raise InputError(f"seconds is {seconds!r}; give a number of at least 0")


def random_ids(vocab_size: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random tokens, on the CPU."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def probe_ids(model: Model, vocab_size: int, length: int, seed: int) -> Tensor:
    """A random row (1, length) on the model's device."""
    return random_ids(vocab_size, (1, length), seed).to(device_of(model))


def _logits(model: Model, rows: Tensor, given: Mapping[str, Tensor]) -> Logits:
    """As `logits_of` of a copy; raises InputError for no tensors, and for a model that exits."""
    try:
        found = logits_of(model, rows.clone(), **given)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit would end the audit, and say that all is well
        raise InputError(f"the model ends the process: {error!r}") from error
    for logits in found.values():
        if not isinstance(logits, Tensor):
            kind = type(logits).__name__
            raise InputError(f"the model gives a {kind} for ids {tuple(rows.shape)}, not (B, T, V)")
        if logits.layout != torch.strided or logits.is_complex() or logits.is_meta:
            raise InputError("the model gives sparse, complex or no numbers; give plain logits")
    return {loop: x.float() if x.dtype == torch.bool else x for loop, x in found.items()}


class Watched(TorchDispatchMode):
    """A context that notes the relative spacing of the coarsest numbers that are computed in it."""

    spacing = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.spacing = max(self.spacing, torch.finfo(x.dtype).eps)
        return out


def _joined(parts: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    if len(parts) == 1:  # what may be losses, without rows
        return parts[0]
    return {loop: torch.cat([part[loop] for part in parts]) for loop in parts[0]}


def largest_difference(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference over the last dimension, as float32 on the CPU.

    Infinite where one of two different values is; none between two equal infinities.
    """
    if not one.is_floating_point():
        one, other = one.float(), other.float()
    apart = (one - other).abs_()
    worst = apart.amax(-1)
    if not worst.isfinite().all():
        apart = apart.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        worst = apart.masked_fill_(one == other, 0.0).amax(-1)
    return worst.float().cpu()


def parameters_of(model: Model) -> set[str]:
    """The names that the model takes."""
    try:
        return set(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):
        return set()


def positions_of(model: Model) -> int | None:
    """How many positions the model's configuration, or that of a part of it, allows."""
    parts = model.modules() if isinstance(model, nn.Module) else (model,)
    configs = (getattr(part, "config", None) for part in parts)
    sizes = (getattr(c, name, None) for c in configs if c is not None for name in _POSITIONS)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def vocabulary_of(model: Model) -> int:
    """How many tokens a model has: what its configuration says, else as many as it has logits.

    Raises InputError where neither says it.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None) or getattr(model, "vocab_size", None)
    if isinstance(size, int) and size > 0:
        return size
    try:
        with torch.no_grad(), own_random_numbers():
            logits = next(iter(_logits(model, probe_ids(model, 2, 4, 0), {}).values()))
        size = logits.shape[-1]
    except InputError:
        raise
    except Exception as error:  # anybody's model: it may fail in any way
        raise InputError(
            "the model does not say how large its vocabulary is; give --vocab-size "
            f"(vocab_size): {type(error).__name__}: {error}"
        ) from error
    tables = model.modules() if isinstance(model, nn.Module) else ()
    sizes = [m.num_embeddings for m in tables if isinstance(m, nn.Embedding)]
    return min(size, max(sizes, default=size))


def refuse(config: Any, name: str = "") -> None:
    """Raise InputError for a model of which nobody asks that it sees no later token.

    `config`: as transformers have it, or None; `name`: of the model's class.
    """
    kind = str(getattr(config, "model_type", "")).lower()
    classes = " ".join([*(getattr(config, "architectures", None) or ()), name])
    if getattr(config, "is_encoder_decoder", False) is True:
        raise InputError(
            f"{kind or 'it'} is an encoder-decoder: its encoder reads the whole input, as it "
            "should; ask its decoder alone, as <module>:<function> from ids to logits"
        )
    if kind.startswith(_DIFFUSION) or "MaskedLM" in classes or "diffusion" in classes.lower():
        raise InputError(
            f"{kind or classes} predicts masked tokens from both sides (a diffusion or masked "
            "language model): it is made to see later tokens, and its score is no causal model's"
        )


def longest_row(asked: Asked, wanted: int) -> int:
    """The longest row, of at most `wanted` tokens, that the model takes."""

    def fails(length: int) -> bool:
        try:
            asked(asked.row(length, seed=0))
        except Exception:  # anybody's model: it may fail in any way
            return True
        return False

    works = asked.ids.shape[1]
    if works >= wanted or not fails(wanted):
        return max(works, wanted)
    return works + bisect_left(range(works + 1, wanted), True, key=fails)


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """A context after which torch's, numpy's and Python's random numbers go on as before."""
    ours, pythons = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(ours)
        random.setstate(pythons)


def _seed(number: int) -> None:
    torch.default_generator.manual_seed(number)  # torch.manual_seed keeps a traceback of each call
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    np.random.seed(number)
    random.seed(number)
