"""What the zoo's models are made of: each a small language model, or a part that mixes over time.

Parts take and give (B, T, d); models take ids (B, T) and give logits (B, T, `VOCAB`).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.model import CRT

VOCAB = 37
CONTEXT = 256


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


class Rounded(nn.Module):
    """`model`, and its logits rounded to bfloat16."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).bfloat16().float()


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


def gpt2(**changes: Any) -> nn.Module:
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
        self.model = gpt2()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=attention_mask).logits
