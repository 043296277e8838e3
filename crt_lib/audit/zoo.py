"""Planted leaks and sound models: what `causality_report` is held against.

Each is small, has `VOCAB` tokens, and is made by a function without arguments. Of what is planted
the name of one probe that is to convict it stands beside it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import ModelConfig
from crt_lib.evaluate import Model
from crt_lib.model import CRT

VOCAB = 37
CONTEXT = 256
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


class Mixed(nn.Module):
    """A language model of one `mix` over time, (B, T, d) to (B, T, d), of `CONTEXT` positions.

    What `add` makes of the ids is added to its logits.
    """

    def __init__(
        self,
        mix: Callable[[Tensor], Tensor] | None = None,
        add: Callable[[Tensor], Tensor] | None = None,
        d: int = 8,
    ):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, d), nn.Linear(d, VOCAB)
        self.mix, self.add = mix or nn.Identity(), add
        self.config = SimpleNamespace(max_seq_len=CONTEXT, vocab_size=VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.mix(self.embed(ids)))
        return logits if self.add is None else logits + self.add(ids)


class Attention(nn.Module):
    """Attention of one head under the mask that `allowed` makes of a length: (T, T)."""

    def __init__(self, allowed: Callable[[int], Tensor], d: int = 8):
        super().__init__()
        self.allowed, self.qkv = allowed, nn.Linear(d, 3 * d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed(x.shape[1]))


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self, both_ways: bool, d: int = 8):
        super().__init__()
        width = d // 2 if both_ways else d
        self.gru = nn.GRU(d, width, batch_first=True, bidirectional=both_ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class BatchNorm(nn.Module):
    """A batch norm over rows and time; with `stored`, in evaluation by its running statistics."""

    def __init__(self, stored: bool, d: int = 8):
        super().__init__()
        self.norm = nn.BatchNorm1d(d, track_running_stats=stored)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class SpectralFilter(nn.Module):
    """A convolution with all that came before, by FFT; without room for it, it wraps around."""

    def __init__(self, wraps: bool, d: int = 8):
        super().__init__()
        self.wraps, self.kernel = wraps, nn.Parameter(torch.randn(2 * CONTEXT, d))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        n = T if self.wraps else 2 * T
        spectrum = torch.fft.rfft(x, n, dim=1) * torch.fft.rfft(self.kernel[:T], n, dim=0)
        return x + torch.fft.irfft(spectrum, n, dim=1)[:, :T]


class Routed(nn.Module):
    """Two experts: each takes the half of the tokens that it likes best, or each token chooses."""

    def __init__(self, tokens_choose: bool, d: int = 8):
        super().__init__()
        self.tokens_choose, self.router = tokens_choose, nn.Linear(d, 2)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)  # (B, T, 2)
        if self.tokens_choose:
            taken = F.one_hot(scores.argmax(-1), 2).bool()
        else:
            best = scores.topk((x.shape[1] + 1) // 2, dim=1).indices
            taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        gates = scores.sigmoid() * taken
        return x + sum(e(x) * gates[..., i : i + 1] for i, e in enumerate(self.experts))


class ReadsLabels(Mixed):
    """Sound as long as nobody gives it labels; then they are in its logits, or in its loss."""

    gives_loss = False

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(ids)
        if labels is None:
            return logits
        logits = logits + F.one_hot(labels, VOCAB)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss if self.gives_loss else logits


class LossOfLabels(ReadsLabels):
    """With labels, which are the next tokens, it gives its loss alone."""

    gives_loss = True


class LogitsAndLoss(Mixed):
    """A pair when it is given targets."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Forgets(CRT):
    """Another state where a memory is kept."""

    def begin(self, ids: Tensor, memory: Any = None) -> tuple[Tensor, Tensor]:
        z, embedded = super().begin(ids, memory)
        return (z if memory is None else z * 1.1), embedded


class Noisy(nn.Module):
    """`model` with noise of `size` on its logits, drawn by `draw` of their shape."""

    def __init__(self, model: nn.Module, draw: Callable[[tuple[int, ...]], Tensor], size: float):
        super().__init__()
        self.model, self.draw, self.size = model, draw, size
        self.config = model.config

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return logits + self.size * self.draw(tuple(logits.shape))


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


def _gpt2(**changes: Any) -> nn.Module:
    """transformers' GPT-2."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_head=2, n_layer=2, n_positions=64, **changes
    )
    config.bos_token_id = config.eos_token_id = 0
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config).eval()


class CountsPadding(nn.Module):
    """transformers' GPT-2, whose positions count the padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _gpt2()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=attention_mask).logits


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
    "GPT-2 of transformers": _gpt2,
    "GPT-2 in bfloat16": lambda: _gpt2().bfloat16(),
    "CRT under autocast to bfloat16": _autocast,
    "masked attention": lambda: Mixed(Attention(_mask())),
    "attention to the last eight": lambda: Mixed(Attention(lambda T: _mask()(T).triu(-7))),
    "recurrent": lambda: Mixed(Recurrent(False)),
    "spectral filter with room": lambda: Mixed(SpectralFilter(False)),
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
