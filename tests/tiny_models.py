"""Tiny models, their options and a probe: what the tests of the model share."""

import dataclasses
import math
import random

import torch

from crt_lib.config import ModelConfig
from crt_lib.model import CRT

TINY = ModelConfig(
    vocab_size=37,
    d_model=16,
    n_heads=2,
    n_loops=4,
    n_cycles=3,
    n_embed_cycles=2,
    dilations=(1, 2, 4),
    max_seq_len=64,
    exit_loops=(1, 3),
    dropout=0.0,
)
SHARINGS = ("separate", "shared_aux", "tied")
NORMS = ("layer", "rms", "batch", "none")
VARIANTS = ("depthwise_mlp", "linear", "conv", "conv_linear", "depthwise")
SHAPES = {
    "shared cycles": {"share_cycle_weights": True},
    "kernel 5": {"kernel_size": 5},
    "kernel 1": {"kernel_size": 1},
    "no embedding cycles": {"n_embed_cycles": 0},
    "more cycles than dilations": {"n_cycles": 4, "dilations": (3, 1)},
    "no intermediate heads": {"exit_loops": ()},
    "narrow MLP, one head": {"mlp_ratio": 1, "n_heads": 1},
    "one loop": {"n_loops": 1, "exit_loops": ()},
}
# Every option at least once, and the combinations whose backward pass differs most.
GRADIENT_CASES = {
    "released": {"causal": False, "head_sharing": "separate"},
    "shared_aux": {},
    "tied": {"head_sharing": "tied", "norm": "rms"},
    "batch": {"norm": "batch", "trm": "conv_linear"},
    "linear": {"trm": "linear", "norm": "none", "head_sharing": "tied"},
    "conv": {"trm": "conv", "share_cycle_weights": True},
    "depthwise": {"trm": "depthwise", "causal": False, "kernel_size": 5},
    "no intermediate heads": {"exit_loops": ()},
}
# Each departure from the paper alone, where the model has another formula for it.
OPTIONS = {
    "pre": {"residual": "pre"},
    "convolution after norm": {"conv_after_norm": True},
    "no pointwise": {"pointwise": False},
    "swiglu": {"activation": "swiglu"},
    "rotary": {"positions": "rotary"},
    "injection": {"injection": True},
    "prelude": {"n_prelude": 2},
    "narrow embedding": {"embed_dim": 6},
    "narrow embedding, tied": {"embed_dim": 6, "head_sharing": "tied"},
    "full embedding": {"embed_dim": 16},
    "full embedding, tied": {"embed_dim": 16, "head_sharing": "tied"},
    "exit norms": {"exit_norm": True},
    "exit norms, tied": {"exit_norm": True, "head_sharing": "tied"},
}
ALL_OPTIONS = {
    "residual": "pre",
    "conv_after_norm": True,
    "pointwise": False,
    "activation": "swiglu",
    "positions": "rotary",
    "injection": True,
    "n_prelude": 1,
    "embed_dim": 16,
    "head_sharing": "tied",
    "exit_norm": True,
}
# Different rates, so that one in another's place is noticed.
DROPOUTS = {
    "none of attention's weights": {"dropout": 0.3, "attention_dropout": 0.0},
    "attention's weights only": {"dropout": 0.0, "attention_dropout": 0.4},
    "embedding only": {"dropout": 0.0, "embed_dropout": 0.4, "injection": True, "n_prelude": 1},
    "all options": {**ALL_OPTIONS, "dropout": 0.2, "attention_dropout": 0.4, "embed_dropout": 0.1},
}
VALUES = {
    "trm": VARIANTS,
    "norm": NORMS,
    "head_sharing": SHARINGS,
    "causal": (True, False),
    "share_cycle_weights": (True, False),
    "kernel_size": (1, 3, 5),
    "residual": ("post", "pre"),
    "conv_after_norm": (True, False),
    "pointwise": (True, False),
    "activation": ("gelu", "swiglu"),
    "positions": ("learned", "rotary"),
    "injection": (True, False),
    "n_prelude": (0, 1, 2),
    "embed_dim": (None, 6, 16),
    "exit_norm": (True, False),
}


def random_combination(seed: int) -> dict:
    """A value of every option."""
    choice = random.Random(seed).choice
    return {name: choice(values) for name, values in VALUES.items()}


COMBINATIONS = {f"combination {seed}": random_combination(seed) for seed in range(30)}
# Of a model that decodes, each option and mixtures of them.
CAUSAL = {
    name: {**changes, "causal": True}
    for name, changes in {
        "paper": {},
        **OPTIONS,
        **COMBINATIONS,
        "linear": {"trm": "linear"},
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A policy whose tokens leave where `loops` (B, T) says, in the shape that is asked about."""

    loops: torch.Tensor
    exits: None = None
    fixed: None = None
    asks: bool = True

    def passes(self, loop) -> torch.Tensor:
        return self.loops.view(loop.z.shape[:-1]) == loop.number


def random_model(seed: int = 0, **changes) -> CRT:
    """A tiny model with nothing left at zero or one, whose activations do not blow up."""
    model = CRT(TINY.replace(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                value.copy_(2 + noise.abs())
            elif "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.dim() > 1 and "positions" not in name and "tokens" not in name:
                value.copy_(0.5 * noise / math.sqrt(value[0].numel()))
            else:
                value.copy_(0.3 * noise)
    return model


def exact_model(seed: int = 0, **changes) -> CRT:
    """`random_model` in float64, where sums in another order are the same to 1e-10."""
    return random_model(seed, **changes).double()


def random_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (rows, length), generator=generator)


def exits_that_see_later_tokens(model: CRT, length: int, positions=None) -> set[int]:
    """Exits where a logit before position j changes, in any bit, when token j does.

    For each j of `positions` (default: all). Row i has its token positions[i] changed, so that
    one pair of passes covers them all.
    """
    j = torch.arange(length) if positions is None else torch.tensor(positions)
    rows = torch.arange(len(j))
    ids = random_ids(1, length).repeat(len(j), 1)
    changed = ids.clone()
    changed[rows, j] = (ids[rows, j] + 1 + rows % (TINY.vocab_size - 1)) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    earlier = torch.arange(length) < j[:, None]  # (rows, T)
    for loop in before:
        reached = (before[loop][rows, j] != after[loop][rows, j]).any(-1)
        assert reached.all(), "a token changes nothing at its own position: the probe is blind"
    return {loop for loop in before if not torch.equal(before[loop][earlier], after[loop][earlier])}


def count_parameters(model):
    """Each counted once, however often it is used."""
    return sum(p.numel() for p in model.parameters())
