"""From the paper's block to `crt2`: the ladder of changes, and what else was tried on top of it."""

from dataclasses import dataclass, field
from typing import Any

from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.profiles import Profile, load_profile


@dataclass(frozen=True)
class Change:
    """A named change of some settings."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __call__(self, profile: Profile) -> Profile:
        """`profile` with the change."""
        return profile.replace(
            model=profile.model.replace(**self.model), train=profile.train.replace(**self.train)
        )


LADDER = (
    Change("pre-norm", {"residual": "pre", "exit_norm": True}),
    Change("scaled init", {"init": "scaled"}),
    Change("conv after norm", {"conv_after_norm": True}),
    Change("no pointwise", {"pointwise": False}),
    Change("full-width embedding", {"embed_dim": 128}),
)

VARIANTS = (
    Change("one exit an update", train={"exits_trained": "one"}),
    Change("muon", train={"optimizer": "muon"}),
    Change("rotary", {"positions": "rotary"}),
    Change("swiglu", {"activation": "swiglu"}),
    Change("injection", {"injection": True}),
    Change("prelude", {"n_prelude": 1, "n_embed_cycles": 0}),
    Change("shared cycles", {"share_cycle_weights": True}),
    Change("wider mlp", {"mlp_ratio": 8}),
    Change("2 loops", {"n_loops": 2, "exit_loops": (1,)}),
    Change("8 loops", {"n_loops": 8, "exit_loops": (2, 4, 6)}),
    Change("1 cycle", {"n_cycles": 1}),
    Change("4 cycles", {"n_cycles": 4}),
    Change("no embedding cycle", {"n_embed_cycles": 0}),
    Change("uniform loops", train={"loop_sampling": "uniform"}),
    Change("poisson loops", train={"loop_sampling": "poisson"}),
    Change("lambda 0.1", train={"aux_weight": 0.1}),
    Change("lambda 0.5", train={"aux_weight": 0.5}),
    Change("dropout 0.1", {"dropout": 0.1, "attention_dropout": 0.0}),
    Change("attention dropout 0.1", {"attention_dropout": 0.1}),
    Change("embedding dropout 0.1", {"embed_dropout": 0.1}),
    Change("plain conv start", {"init": "torch"}),
)


def search_base() -> Profile:
    """The size at which the search is made: the paper's block, 0.6M tokens of WikiText-2."""
    small = load_profile("small", "paper")
    model = ModelConfig(
        d_model=128,
        n_heads=4,
        n_loops=4,
        n_cycles=2,
        n_embed_cycles=1,
        max_seq_len=256,
        exit_loops=(1, 2, 3),
        head_sharing="tied",
        dropout=0.0,
    )
    config = small.train.replace(updates=300, eval_every=0, eval_tokens=65_536, precision="bf16")
    return small.replace(model=model, train=config)


def ladder_arms() -> dict[str, Profile]:
    """The paper's block, then every change added to those before it."""
    profile = search_base()
    arms = {"paper": profile}
    for change in LADDER:
        profile = change(profile)
        arms[f"+ {change.name}"] = profile
    return arms


def variant_arms() -> dict[str, Profile]:
    """The top of the ladder with one more change each."""
    *_, top = ladder_arms().values()
    return {change.name: change(top) for change in VARIANTS}


def baseline_arms() -> dict[str, Profile]:
    """What `crt2` is held against at equal parameters, and the block with untied heads."""
    base = search_base()
    gpt2 = {
        f"GPT-2 {d} x {layers}": base.replace(
            model=GPT2Config(d_model=d, n_heads=4, n_layers=layers, max_seq_len=256, dropout=0.0)
        )
        for d, layers in ((128, 3), (112, 4), (128, 6))
    }
    return {
        "released": base.replace(model=base.model.replace(causal=False)),
        "paper, shared_aux heads": base.replace(
            model=base.model.replace(head_sharing="shared_aux")
        ),
        "paper, d = 160": base.replace(model=base.model.replace(d_model=160)),
    } | gpt2
