"""The probes for causality: they clear what is sound and convict every planted leak."""

import pytest
import torch
import torch.nn.functional as F
from tiny_hf import gpt2
from tiny_models import TINY
from torch import nn

from crt_lib import CRT, causality_report, load_profile
from crt_lib.audit.probes import PROBES
from crt_lib.files import InputError

VOCAB = TINY.vocab_size
PAPER = load_profile("smoke", "paper").model.replace(vocab_size=VOCAB)
CRT2 = load_profile("smoke", "crt2").model.replace(vocab_size=VOCAB)
SEEDS = range(6)
LENGTH = 12


class Mixed(nn.Module):
    """A language model of one `mix` over time: (B, T, d) to (B, T, d)."""

    def __init__(self, mix=None, d=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, d), nn.Linear(d, VOCAB)
        self.mix = mix or nn.Identity()

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)))


class BatchNormOverTime(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm = nn.BatchNorm1d(d)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class BlockMeans(nn.Module):
    """Means over blocks of four, broadcast back to all their positions."""

    def forward(self, x):
        T = x.shape[1]
        padded = F.pad(x, (0, 0, 0, -T % 4)).unflatten(1, (-1, 4))
        return x + padded.mean(2, keepdim=True).expand_as(padded).flatten(1, 2)[:, :T]


class SpectralFilter(nn.Module):
    """A convolution with all that came before, by FFT; without room for it, it wraps around."""

    def __init__(self, wraps, length=64, d=8):
        super().__init__()
        self.wraps, self.kernel = wraps, nn.Parameter(torch.randn(length, d))

    def forward(self, x):
        T = x.shape[1]
        n = T if self.wraps else 2 * T
        spectrum = torch.fft.rfft(x, n, dim=1) * torch.fft.rfft(self.kernel[:T], n, dim=0)
        return x + torch.fft.irfft(spectrum, n, dim=1)[:, :T]


class MaskedAttention(nn.Module):
    """Attention with a mask whose diagonal is `ahead` to the right of the sound one."""

    def __init__(self, ahead, d=8):
        super().__init__()
        self.ahead, self.qkv = ahead, nn.Linear(d, 3 * d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(self.ahead)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ReadsLabels(Mixed):
    """Its logits are sound as long as nobody gives it labels."""

    def forward(self, ids, labels=None):
        logits = super().forward(ids)
        return logits if labels is None else logits + F.one_hot(labels, VOCAB)


class FarAhead(nn.Module):
    """What stands `far` positions later, added."""

    def __init__(self, far):
        super().__init__()
        self.far = far

    def forward(self, x):
        return x + F.pad(x, (0, 0, 0, self.far))[:, self.far :]


class LossOfLabels(ReadsLabels):
    """As those, but with labels, which are the next tokens, it gives its loss alone."""

    def forward(self, ids, labels=None):
        logits = super().forward(ids, labels)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class LogitsAndLoss(Mixed):
    """A pair when it is given targets."""

    def forward(self, ids, targets=None):
        logits = super().forward(ids)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


PLANTED = {  # the model, and the nearest later token that it sees
    "symmetric convolution": (lambda: CRT(PAPER.replace(causal=False)), 1),
    "batch norm over time": (lambda: Mixed(BatchNormOverTime()), 1),
    "block means": (lambda: Mixed(BlockMeans()), 1),
    "spectral filter": (lambda: Mixed(SpectralFilter(wraps=True)), 1),
    "mask off by one": (lambda: Mixed(MaskedAttention(ahead=1)), 1),
    "reads its labels": (ReadsLabels, 1),
    "five tokens ahead": (lambda: Mixed(FarAhead(5)), 5),
    "labels in its loss": (LossOfLabels, 1),
}
SOUND = {
    "paper, causal": lambda: CRT(PAPER),
    "crt2": lambda: CRT(CRT2),
    "GPT-2 of transformers": gpt2,
    "spectral filter with room": lambda: Mixed(SpectralFilter(wraps=False)),
    "GPT-2 in bf16": lambda: gpt2().bfloat16(),
    "logits and loss": LogitsAndLoss,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED)
def test_convicts(name, seed):
    make, nearest = PLANTED[name]
    torch.manual_seed(seed)
    report = causality_report(make(), VOCAB, length=LENGTH, seed=seed)
    assert report.leaks, str(report)
    assert report.first_leaking_offset == nearest


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOUND)
def test_clears(name, seed):
    torch.manual_seed(seed)
    report = causality_report(SOUND[name](), VOCAB, length=LENGTH, seed=seed)
    assert not report.leaks, str(report)
    assert report.first_leaking_offset is None


@pytest.mark.parametrize("name", ["paper, causal", "crt2", "GPT-2 of transformers"])
def test_what_is_asked_of_a_module(name):
    torch.manual_seed(0)
    report = causality_report(SOUND[name](), VOCAB, length=LENGTH)
    assert {*report.findings, *report.left_out} == set(PROBES)
    assert {"tokens", "training", "gradient", "prefix", "decode"} <= set(report.findings)
    for name in ("tokens", "training", "gradient"):
        for found in report.findings[name].values():
            assert (found.influence.diagonal() > 0).all(), f"{name} is blind"


def test_each_probe_finds_what_others_miss():
    torch.manual_seed(0)
    norm = causality_report(Mixed(BatchNormOverTime()), VOCAB, length=LENGTH)
    assert norm.convicting == ["training"]

    class LastOnly(Mixed):
        """Adds what depends on how many tokens there are: no single token shows it."""

        def forward(self, ids):
            return super().forward(ids) * (1 + ids.shape[1])

    counts = causality_report(LastOnly(), VOCAB, length=LENGTH)
    assert counts.convicting == ["prefix"]


def test_a_plain_function():
    def peeks(ids):
        return F.one_hot(ids.roll(-1, 1), VOCAB).float()

    report = causality_report(peeks, VOCAB, length=LENGTH)
    assert report.leaks and report.first_leaking_offset == 1
    assert {"training", "gradient", "decode", "labels"} == set(report.left_out)
    assert len(report.findings["far"][0].pairs) == 1
    sound = causality_report(lambda ids: F.one_hot(ids, VOCAB).float(), VOCAB, length=LENGTH)
    assert not sound.leaks and "verdict: causal" in str(sound)


def test_a_broken_cache_is_seen():
    class Forgets(CRT):
        def begin(self, ids, memory=None):
            z, embedded = super().begin(ids, memory)
            return (z if memory is None else z * 1.1), embedded

    torch.manual_seed(0)
    report = causality_report(Forgets(CRT2), VOCAB, length=LENGTH)
    assert report.convicting == ["decode"]
    assert "verdict: its cache gives other logits" in str(report)


def test_a_leak_further_away_than_the_row_is_long():
    torch.manual_seed(0)
    report = causality_report(Mixed(FarAhead(30)), VOCAB, length=LENGTH)
    assert report.leaks and report.first_leaking_offset is None
    assert report.convicting == ["far"]
    assert "as far as 12 tokens" in str(causality_report(CRT(CRT2), VOCAB, length=LENGTH))


@pytest.mark.parametrize("leaks", [False, True])
def test_infinite_logits(leaks):
    model = Mixed(FarAhead(1) if leaks else None)

    def masked(ids):
        """No token may be said twice in a row."""
        with torch.no_grad():
            logits = model(ids).masked_fill(F.one_hot(ids, VOCAB).bool(), -torch.inf)
        logits[..., -3:] = -torch.inf
        return logits

    assert causality_report(masked, VOCAB, length=LENGTH).leaks == leaks
    with pytest.raises(InputError, match="not numbers"):
        causality_report(lambda ids: masked(ids) * 0, VOCAB, length=LENGTH)


def test_a_probe_at_which_the_model_fails_is_left_out():
    def only_24(ids):
        if ids.shape[1] != 24:
            raise RuntimeError("24 tokens, please")
        return F.one_hot(ids, VOCAB).float()

    report = causality_report(only_24, VOCAB)
    assert not report.leaks and "24 tokens, please" in report.left_out["prefix"]
    with pytest.raises(InputError, match="fails on ids of shape"):
        causality_report(only_24, VOCAB, length=12)


def test_a_loss_that_is_not_plain_is_not_judged():
    class Smoothed(Mixed):
        def forward(self, ids, labels=None):
            logits = super().forward(ids)
            if labels is None:
                return logits
            return 2.0 + F.cross_entropy(logits[0], labels[0])

    report = causality_report(Smoothed(), VOCAB, length=LENGTH)
    assert not report.leaks and "no cross-entropy" in report.left_out["labels"]


def test_the_model_is_left_as_it_was():
    model = Mixed(BatchNormOverTime()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    causality_report(model, VOCAB, length=4)
    assert model.training and model.mix.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_asked():
    with pytest.raises(InputError, match="at least 2"):
        causality_report(Mixed(), VOCAB, length=1)
    with pytest.raises(InputError, match="random"):
        causality_report(lambda ids: torch.randn(*ids.shape, VOCAB), VOCAB)
    with pytest.raises(InputError, match=r"not \(B, T, V\)"):
        causality_report(lambda ids: torch.zeros(len(ids), VOCAB), VOCAB)
