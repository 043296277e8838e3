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
WIDTH = 8
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
Add = Callable[[Tensor], Tensor]


class Mixed(nn.Module):
    """A language model of `CONTEXT` positions, ids (B, T) to logits (B, T, `VOCAB`).

    `mix` takes and gives (B, T, WIDTH), and takes `part`, where there is one. What each `add` makes
    of the ids is added to the logits.
    """

    def __init__(
        self, *add: Add, mix: Callable[..., Tensor] | None = None, part: nn.Module | None = None
    ):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.mix, self.part, self.add = mix or nn.Identity(), part, add
        self.config = SimpleNamespace(max_seq_len=CONTEXT, vocab_size=VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        parts = () if self.part is None else (self.part,)
        logits: Tensor = self.head(self.mix(self.embed(ids), *parts))
        return sum((add(ids) for add in self.add), logits)


class Labelled(Mixed):
    """Sound as long as nobody gives it labels; then it gives what `says` makes of both."""

    def __init__(self, says: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.says = says

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        return logits if labels is None else self.says(logits, labels)


class Forgets(CRT):
    """Another state where a memory is kept."""

    def begin(self, ids: Tensor, memory: Any = None) -> tuple[Tensor, Tensor]:
        z, embedded = super().begin(ids, memory)
        return (z if memory is None else z * 1.1), embedded


def attention(allowed: Callable[[Tensor, Tensor], Tensor], *add: Add) -> Mixed:
    """Attention of one head, of positions t (T, 1) to the positions j (1, T) that are `allowed`."""

    def mix(x: Tensor, qkv: nn.Module) -> Tensor:
        q, k, v = qkv(x).chunk(3, dim=-1)
        t = torch.arange(x.shape[1])
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed(t[:, None], t[None]))

    return Mixed(*add, mix=mix, part=nn.Linear(WIDTH, 3 * WIDTH))


def scaled(by: Callable[[Tensor], float | Tensor]) -> Mixed:
    """The states times what `by` makes of them."""
    return Mixed(mix=lambda x: x * by(x))


def recurrent(both_ways: bool) -> Mixed:
    """A GRU."""
    width = WIDTH // 2 if both_ways else WIDTH
    gru = nn.GRU(WIDTH, width, batch_first=True, bidirectional=both_ways)
    return Mixed(mix=lambda x, gru: gru(x)[0], part=gru)


def batch_norm(stored: bool) -> Mixed:
    """A batch norm over rows and time; with `stored`, in evaluation by its running statistics."""
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=stored)
    return Mixed(mix=lambda x, norm: norm(x.mT).mT, part=norm)


def spectral_filter(wraps: bool, *add: Add) -> Mixed:
    """A convolution with all that came before, by FFT; without room for it, it wraps around."""

    def mix(x: Tensor, kernel: nn.Embedding) -> Tensor:
        T = x.shape[1]
        n = T if wraps else 2 * T
        spectrum = torch.fft.rfft(x, n, dim=1) * torch.fft.rfft(kernel.weight[:T], n, dim=0)
        return x + torch.fft.irfft(spectrum, n, dim=1)[:, :T]

    return Mixed(*add, mix=mix, part=nn.Embedding(2 * CONTEXT, WIDTH))


def routed(tokens_choose: bool) -> Mixed:
    """Two experts: each takes the half of the tokens that it likes best, or each token chooses."""

    def mix(x: Tensor, layers: nn.ModuleList) -> Tensor:
        router, *experts = layers
        scores = router(x)  # (B, T, 2)
        best = scores.topk((x.shape[1] + 1) // 2, dim=1).indices
        taken = torch.zeros_like(scores).scatter(1, best, 1.0)
        if tokens_choose:
            taken = F.one_hot(scores.argmax(-1), 2)
        gates = scores.sigmoid() * taken
        return x + sum(e(x) * gates[..., i : i + 1] for i, e in enumerate(experts))

    return Mixed(mix=mix, part=nn.ModuleList(nn.Linear(WIDTH, n) for n in (2, WIDTH, WIDTH)))


def rounded(model: nn.Module) -> nn.Module:
    """`model`, its logits rounded to bfloat16."""
    model.register_forward_hook(lambda module, args, logits: logits.bfloat16().float())
    return model


def evaluated(model: nn.Module) -> Model:
    """A model as a function: it has no training mode to be asked in."""
    model.eval()
    return lambda ids: model(ids)


def gpt2() -> nn.Module:
    """transformers' GPT-2."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_head=2, n_layer=2, n_positions=64
    )
    config.bos_token_id = config.eos_token_id = 0
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config).eval()


def counts_padding() -> Model:
    """transformers' GPT-2, whose positions count the padding too."""
    model = gpt2()
    return lambda ids, attention_mask=None: model(ids, attention_mask=attention_mask).logits


def ahead(far: int, where: Callable[[Tensor], Tensor] | None = None, size: float = 1.0) -> Add:
    """One-hot the token `far` ahead, at the positions t of `where`."""

    def add(ids: Tensor) -> Tensor:
        later = F.pad(F.one_hot(ids, VOCAB)[:, far:], (0, 0, 0, min(far, ids.shape[1])))
        t = torch.arange(ids.shape[1], device=ids.device)
        return size * (later if where is None else later * where(t)[:, None])

    return add


def noise(size: float, numbers: Any = None) -> Add:
    """Normal numbers of `size`: numpy's, or of a generator that nobody outside can seed."""
    numbers = numbers or np.random.default_rng(0)
    return lambda ids: size * torch.from_numpy(numbers.normal(size=(*ids.shape, VOCAB))).float()


def one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids, VOCAB).float()


def _scaled_noise() -> Model:
    """The next token sets how large its noise is."""
    draw = noise(0.01)

    def model(ids: Tensor) -> Tensor:
        size = 1 + 5 * ahead(1)(ids)[..., VOCAB // 2 :].sum(-1, keepdim=True)
        return one_hot(ids) + size * draw(ids)

    return model


def _block_means(x: Tensor) -> Tensor:
    """Means over blocks of four, broadcast back to all their positions."""
    T = x.shape[1]
    padded = F.pad(x, (0, 0, 0, -T % 4)).unflatten(1, (-1, 4))
    return x + padded.mean(2, keepdim=True).expand_as(padded).flatten(1, 2)[:, :T]


def _late_row_before(x: Tensor) -> Tensor:
    late = torch.arange(x.shape[1])[:, None] >= 100
    return x + 0.1 * x.roll(1, 0) * late


def _summed(x: Tensor) -> Tensor:
    """All states so far, added up by FFT: its rounding is that of the whole row."""
    T = x.shape[1]
    ones = torch.fft.rfft(torch.ones(T), 2 * T)[:, None]
    return torch.fft.irfft(torch.fft.rfft(x, 2 * T, dim=1) * ones, 2 * T, dim=1)[:, :T]


def _dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.2, training=True)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


_BY_PROBE: dict[str, dict[str, Callable[[], Model]]] = {
    "tokens": {
        "CRT as released, symmetric": lambda: CRT(TINY.replace(causal=False)),
        "no mask": lambda: attention(lambda t, j: t + j >= 0),
        "mask off by one": lambda: attention(lambda t, j: j <= t + 1),
        "mask of whole blocks": lambda: attention(lambda t, j: j // 8 <= t // 8),
        "spectral filter that wraps": lambda: spectral_filter(True),
        "how often the token stands in the row": lambda: Mixed(
            lambda ids: (ids[:, :, None] == ids[:, None]).float().mean(2, keepdim=True)
        ),
        "a ten-thousandth of the next token": lambda: Mixed(ahead(1, size=1e-4)),
        "rounded, a tenth of the next token": lambda: rounded(
            spectral_filter(False, ahead(1, size=0.1))
        ),
        "five ahead": lambda: Mixed(ahead(5)),
        "only the second exit": lambda: lambda ids: {1: one_hot(ids), 2: ahead(1)(ids)},
        "dropout, and the next token": lambda: Mixed(ahead(1, size=1e-2), mix=_dropped),
        "noise of its own, and the next token": lambda: Mixed(ahead(1), noise(0.1)),
        "noise as large as the next token says": _scaled_noise,
    },
    "training": {"batch norm over time, in training": lambda: batch_norm(True)},
    "gradient": {"recurrent both ways": lambda: recurrent(True)},
    "prefix": {
        "block means": lambda: Mixed(mix=_block_means),
        "positions from the end": lambda: Mixed(
            mix=lambda x: x + 0.01 * torch.arange(x.shape[1], 0, -1)[:, None]
        ),
        "scaled by the length": lambda: scaled(lambda x: 1 + 0.1 * x.shape[1]),
        "dropout, and the length": lambda: Mixed(mix=lambda x: _dropped(x) * x.shape[1]),
    },
    "lengths": {
        "scaled by a length over 100": lambda: scaled(lambda x: 1 + 0.1 * (x.shape[1] > 100)),
        "dropout, and a length over 200": lambda: Mixed(
            mix=lambda x: _dropped(x) * (1 + (x.shape[1] > 200))
        ),
    },
    "decode": {"a cache that forgets": lambda: Forgets(TINY)},
    "far": {
        "mask too short for the row": lambda: attention(lambda t, j: (j <= t) | (t >= 64)),
        "experts choose tokens": lambda: routed(False),
        "thirty ahead": lambda: Mixed(ahead(30)),
        "two hundred ahead": lambda: Mixed(ahead(200)),
        "from position 200 on": lambda: Mixed(ahead(1, lambda t: t >= 200)),
        "at the last positions": lambda: Mixed(ahead(1, lambda t: t >= CONTEXT - 3)),
        "at one position": lambda: Mixed(ahead(1, lambda t: t == 123)),
        "at ten positions": lambda: Mixed(ahead(2, lambda t: (t >= 90) & (t < 100))),
        "every 37th position": lambda: Mixed(ahead(1, lambda t: t % 37 == 36)),
        "where blocks of 64 meet": lambda: Mixed(ahead(1, lambda t: t % 64 == 63)),
        "numpy's noise, and a far token": lambda: Mixed(
            ahead(100, size=0.1), noise(0.1, np.random)
        ),
    },
    "vocabulary": {
        "scaled by the whole row": lambda: scaled(lambda x: 1 / x.norm(dim=(1, 2), keepdim=True)),
        "one token, next": lambda: Mixed(lambda ids: 0.1 * ahead(1)(ids)[..., 17:18]),
        "one token, any time later": lambda: Mixed(
            lambda ids: 0.1 * ahead(1)(ids)[..., 5:6].flip(1).cumsum(1).flip(1)
        ),
        "one token, next, at the last position": lambda: Mixed(
            lambda ids: 0.1 * ahead(1, lambda t: t == CONTEXT - 2)(ids)[..., 17:18]
        ),
        "after one token alone, from position 250 on": lambda: Mixed(
            lambda ids: ahead(1, lambda t: t >= 250)(ids) * (ids == 11)[..., None]
        ),
        "after one token alone": lambda: Mixed(lambda ids: ahead(1)(ids) * (ids == 11)[..., None]),
    },
    "labels": {
        "labels in its logits": lambda: Labelled(lambda x, labels: x + one_hot(labels)),
        "labels in its loss": lambda: Labelled(
            lambda x, labels: _loss(x + one_hot(labels), labels)
        ),
    },
    "rows": {
        "mean of the batch": lambda: Mixed(mix=lambda x: x + 1e-3 * x.mean(0)),
        "the row before": lambda: Mixed(mix=lambda x: x + 0.1 * x.roll(1, 0)),
        "the first of more than eight rows": lambda: Mixed(
            mix=lambda x: x + 0.1 * x[:1] * (len(x) > 8)
        ),
        "the row before, from position 100 on": lambda: Mixed(mix=_late_row_before),
        "batch statistics in evaluation": lambda: batch_norm(False),
        "noise of its own, and the other rows": lambda: Mixed(
            noise(0.05), mix=lambda x: x + x.mean(0)
        ),
    },
    "count": {
        "scaled by the number of rows": lambda: scaled(lambda x: 1 + 0.1 * len(x)),
        "scaled where there are five rows": lambda: scaled(lambda x: 1 + (len(x) == 5)),
    },
    "padding": {"padding counts as positions": counts_padding},
}
PLANTED = {
    name: (make, probe) for probe, models in _BY_PROBE.items() for name, make in models.items()
}

SOUND: dict[str, Callable[[], Model]] = {
    "CRT, causal, with exits": lambda: CRT(TINY),
    "CRT without exits": lambda: CRT(TINY.replace(exit_loops=())),
    "batch norm, in evaluation": lambda: evaluated(batch_norm(True)),
    "GPT-2 of transformers": gpt2,
    "GPT-2 in bfloat16": lambda: gpt2().bfloat16(),
    "CRT under autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16)(
        evaluated(CRT(TINY))
    ),
    "masked attention": lambda: attention(lambda t, j: j <= t),
    "attention to the last eight": lambda: attention(lambda t, j: (j <= t) & (j > t - 8)),
    "recurrent": lambda: recurrent(False),
    "spectral filter with room": lambda: spectral_filter(False),
    "spectral filter, rounded": lambda: rounded(spectral_filter(False)),
    "spectral filter, rounded, a function": lambda: evaluated(rounded(spectral_filter(False))),
    "sum of the past by FFT, a function": lambda: evaluated(Mixed(mix=_summed)),
    "mean of the past": lambda: Mixed(
        mix=lambda x: x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    ),
    "tokens choose experts": lambda: routed(True),
    "logits and a loss": lambda: Labelled(lambda x, labels: (x, _loss(x, labels))),
    "masked logits": lambda: evaluated(Mixed(lambda ids: (1 - one_hot(ids)).log())),
    "a function of the own token": lambda: one_hot,
    "dropout at all times": lambda: Mixed(mix=_dropped),
    "noise of torch": lambda: Mixed(lambda ids: 0.1 * torch.randn(*ids.shape, VOCAB)),
    "noise of numpy": lambda: Mixed(noise(0.1, np.random)),
    "noise of its own": lambda: Mixed(noise(0.1)),
    "little noise of its own": lambda: attention(lambda t, j: j <= t, noise(1e-4)),
}
