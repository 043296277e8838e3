"""Planted leaks and sound models: what `causality_report` is held against.

Each is small, has `VOCAB` tokens, and is made by a function without arguments. Of what is planted
the name of one probe that is to convict it stands beside it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.audit.specimens import (
    CONTEXT,
    VOCAB,
    Attention,
    BatchNorm,
    CountsPadding,
    Forgets,
    LogitsAndLoss,
    LossOfLabels,
    Mixed,
    Noisy,
    ReadsLabels,
    Recurrent,
    Rounded,
    Routed,
    SpectralFilter,
    gpt2,
)
from crt_lib.config import ModelConfig
from crt_lib.evaluate import Model
from crt_lib.model import CRT

TINY = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    n_heads=2,
    n_loops=3,
    n_cycles=2,
    n_embed_cycles=1,
    dilations=(1, 2),
    max_seq_len=64,
    exit_loops=(1,),
    dropout=0.1,
)


def own_numbers(seed: int = 0) -> Callable[[tuple[int, ...]], Tensor]:
    """Normal numbers of a generator that nobody outside can seed."""
    generator = np.random.default_rng(seed)
    return lambda shape: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _two_exits(ids: Tensor) -> dict[int, Tensor]:
    """The second exit sees the next token; nothing is learned."""
    own = F.one_hot(ids, VOCAB).float()
    return {1: own, 2: own + _ahead(1)(ids)}


def _scaled_noise() -> Callable[[Tensor], Tensor]:
    """The next token sets how large its noise is."""
    draw = own_numbers()

    def model(ids: Tensor) -> Tensor:
        own = F.one_hot(ids, VOCAB).float()
        size = 1 + 5 * _ahead(1)(ids)[..., VOCAB // 2 :].sum(-1, keepdim=True)
        return own + 0.01 * size * draw(tuple(own.shape))

    return model


def _ahead(
    far: int, where: Callable[[Tensor], Tensor] | None = None, size: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """One-hot the token `far` ahead, at the positions t of `where`."""

    def add(ids: Tensor) -> Tensor:
        later = F.pad(F.one_hot(ids, VOCAB)[:, far:], (0, 0, 0, min(far, ids.shape[1])))
        t = torch.arange(ids.shape[1], device=ids.device)
        return size * (later if where is None else later * where(t)[:, None])

    return add


def _only(token: int, anywhere: bool) -> Callable[[Tensor], Tensor]:
    """Whether `token` comes next, or at any time later."""

    def add(ids: Tensor) -> Tensor:
        seen = F.pad((ids == token)[:, 1:], (0, 1)).float()
        return 0.1 * (seen.flip(1).cumsum(1).flip(1) if anywhere else seen)[..., None]

    return add


def _after(token: int) -> Callable[[Tensor], Tensor]:
    """The next token, where the own one is `token`."""
    return lambda ids: _ahead(1)(ids) * (ids == token)[..., None]


def _frequency(ids: Tensor) -> Tensor:
    """How often the own token stands in the row."""
    return (ids[:, :, None] == ids[:, None]).float().mean(2, keepdim=True)


def _from_the_end(x: Tensor) -> Tensor:
    return x + 0.01 * torch.arange(x.shape[1], 0, -1)[:, None]


def _block_means(x: Tensor) -> Tensor:
    """Means over blocks of four, broadcast back to all their positions."""
    T = x.shape[1]
    padded = F.pad(x, (0, 0, 0, -T % 4)).unflatten(1, (-1, 4))
    return x + padded.mean(2, keepdim=True).expand_as(padded).flatten(1, 2)[:, :T]


def _mask(ahead: int = 0) -> Callable[[int], Tensor]:
    return lambda T: torch.ones(T, T, dtype=torch.bool).tril(ahead)


def _short_mask(T: int) -> Tensor:
    """A mask of 64 positions in a row that has more: the rest sees all."""
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[:64] = _mask()(T)[:64]
    return mask


def _blocks(T: int) -> Tensor:
    """Blocks of eight, each seen as a whole."""
    block = torch.arange(T) // 8
    return block[:, None] >= block


def _autocast() -> Model:
    model = CRT(TINY)

    def asked(ids: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model.eval()(ids)

    return asked


def _evaluated(model: nn.Module) -> Model:
    """A model as a function: it has no training mode to be asked in."""
    model.eval()
    return lambda ids: model(ids)


def _masked_logits() -> Model:
    """No token may be said twice in a row."""
    model = Mixed()
    return lambda ids: model(ids).masked_fill(F.one_hot(ids, VOCAB).bool(), -torch.inf)


def _always_dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.2, training=True)


def _past_mean(x: Tensor) -> Tensor:
    return x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def _numpy_noise(shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.standard_normal(shape)).float()


PLANTED: dict[str, tuple[Callable[[], Model], str]] = {
    "CRT as released, symmetric": (lambda: CRT(TINY.replace(causal=False)), "tokens"),
    "no mask": (lambda: Mixed(Attention(_mask(CONTEXT))), "tokens"),
    "mask off by one": (lambda: Mixed(Attention(_mask(1))), "tokens"),
    "mask too short for the row": (lambda: Mixed(Attention(_short_mask)), "far"),
    "mask of whole blocks": (lambda: Mixed(Attention(_blocks)), "tokens"),
    "recurrent both ways": (lambda: Mixed(Recurrent(True)), "gradient"),
    "block means": (lambda: Mixed(_block_means), "prefix"),
    "spectral filter that wraps": (lambda: Mixed(SpectralFilter(True)), "tokens"),
    "batch norm over time, in training": (lambda: Mixed(BatchNorm(True)), "training"),
    "scaled by the whole row": (
        lambda: Mixed(lambda x: x / x.norm(dim=(1, 2), keepdim=True)),
        "vocabulary",
    ),
    "experts choose tokens": (lambda: Mixed(Routed(False)), "far"),
    "how often the token stands in the row": (lambda: Mixed(add=_frequency), "tokens"),
    "positions from the end": (lambda: Mixed(_from_the_end), "prefix"),
    "scaled by the length": (lambda: Mixed(lambda x: x * (1 + 0.1 * x.shape[1])), "prefix"),
    "scaled by a length over 100": (
        lambda: Mixed(lambda x: x * (1 + 0.1 * (x.shape[1] > 100))),
        "lengths",
    ),
    "a ten-thousandth of the next token": (lambda: Mixed(add=_ahead(1, size=1e-4)), "tokens"),
    "rounded, a tenth of the next token": (
        lambda: Rounded(Mixed(SpectralFilter(False), add=_ahead(1, size=0.1))),
        "tokens",
    ),
    "five ahead": (lambda: Mixed(add=_ahead(5)), "tokens"),
    "thirty ahead": (lambda: Mixed(add=_ahead(30)), "far"),
    "two hundred ahead": (lambda: Mixed(add=_ahead(200)), "far"),
    "from position 200 on": (lambda: Mixed(add=_ahead(1, lambda t: t >= 200)), "far"),
    "at the last positions": (lambda: Mixed(add=_ahead(1, lambda t: t >= CONTEXT - 3)), "far"),
    "at one position": (lambda: Mixed(add=_ahead(1, lambda t: t == 123)), "far"),
    "at ten positions": (lambda: Mixed(add=_ahead(2, lambda t: (t >= 90) & (t < 100))), "far"),
    "every 37th position": (lambda: Mixed(add=_ahead(1, lambda t: t % 37 == 36)), "far"),
    "where blocks of 64 meet": (lambda: Mixed(add=_ahead(1, lambda t: t % 64 == 63)), "far"),
    "one token, next": (lambda: Mixed(add=_only(17, False)), "vocabulary"),
    "one token, any time later": (lambda: Mixed(add=_only(5, True)), "vocabulary"),
    "after one token alone": (lambda: Mixed(add=_after(11)), "vocabulary"),
    "only the second exit": (lambda: _two_exits, "tokens"),
    "labels in its logits": (ReadsLabels, "labels"),
    "labels in its loss": (LossOfLabels, "labels"),
    "mean of the batch": (lambda: Mixed(lambda x: x + 1e-3 * x.mean(0, keepdim=True)), "rows"),
    "the row before": (lambda: Mixed(lambda x: x + 0.1 * x.roll(1, 0)), "rows"),
    "the row before, from position 100 on": (
        lambda: Mixed(
            lambda x: x + F.pad(0.1 * x.roll(1, 0)[:, 100:], (0, 0, min(100, x.shape[1]), 0))
        ),
        "rows",
    ),
    "batch statistics in evaluation": (lambda: Mixed(BatchNorm(False)), "rows"),
    "scaled by the number of rows": (lambda: Mixed(lambda x: x * (1 + 0.1 * len(x))), "count"),
    "scaled where there are five rows": (
        lambda: Mixed(lambda x: x * (1 + 0.1 * (len(x) == 5))),
        "count",
    ),
    "a cache that forgets": (lambda: Forgets(TINY), "decode"),
    "padding counts as positions": (CountsPadding, "padding"),
    "dropout, and the next token": (
        lambda: Mixed(_always_dropped, _ahead(1, size=1e-2)),
        "tokens",
    ),
    "dropout, and the length": (
        lambda: Mixed(lambda x: _always_dropped(x) * x.shape[1]),
        "prefix",
    ),
    "dropout, and a length over 200": (
        lambda: Mixed(lambda x: _always_dropped(x) * (1 + (x.shape[1] > 200))),
        "lengths",
    ),
    "numpy's noise, and a far token": (
        lambda: Noisy(Mixed(add=_ahead(100, size=0.1)), _numpy_noise, 0.1),
        "far",
    ),
    "noise of its own, and the next token": (
        lambda: Noisy(Mixed(add=_ahead(1)), own_numbers(), 0.1),
        "tokens",
    ),
    "noise as large as the next token says": (_scaled_noise, "tokens"),
    "noise of its own, and the other rows": (
        lambda: Noisy(Mixed(lambda x: x + x.mean(0, keepdim=True)), own_numbers(), 0.05),
        "rows",
    ),
}

SOUND: dict[str, Callable[[], Model]] = {
    "CRT, causal, with exits": lambda: CRT(TINY),
    "CRT without exits": lambda: CRT(TINY.replace(exit_loops=())),
    "batch norm, in evaluation": lambda: _evaluated(Mixed(BatchNorm(True))),
    "GPT-2 of transformers": gpt2,
    "GPT-2 in bfloat16": lambda: gpt2().bfloat16(),
    "CRT under autocast to bfloat16": _autocast,
    "masked attention": lambda: Mixed(Attention(_mask())),
    "attention to the last eight": lambda: Mixed(Attention(lambda T: _mask()(T).triu(-7))),
    "recurrent": lambda: Mixed(Recurrent(False)),
    "spectral filter with room": lambda: Mixed(SpectralFilter(False)),
    "spectral filter, rounded": lambda: Rounded(Mixed(SpectralFilter(False))),
    "spectral filter, rounded, a function": lambda: _evaluated(
        Rounded(Mixed(SpectralFilter(False)))
    ),
    "mean of the past": lambda: Mixed(_past_mean),
    "tokens choose experts": lambda: Mixed(Routed(True)),
    "logits and a loss": LogitsAndLoss,
    "masked logits": _masked_logits,
    "a function of the own token": lambda: lambda ids: F.one_hot(ids, VOCAB).float(),
    "dropout at all times": lambda: Mixed(_always_dropped),
    "noise of torch": lambda: Noisy(Mixed(), lambda shape: torch.randn(shape), 0.1),
    "noise of numpy": lambda: Noisy(Mixed(), _numpy_noise, 0.1),
    "noise of its own": lambda: Noisy(Mixed(), own_numbers(), 0.1),
    "little noise of its own": lambda: Noisy(Mixed(Attention(_mask())), own_numbers(1), 1e-4),
}
