"""The arms of the search: the ladder from `paper` to `crt2`, and what was tried around `crt2`.

All at one small size, d = 128, in updates of 2,048 tokens of WikiText-2, unless an arm is about
size. `crt search` runs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from crt_lib.config import GPT2Config
from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile, load_profile

EQUAL_TOKENS, EQUAL_TIME = "300 updates", "2 min"  # the budgets at which baselines are compared
RUNG_TOKENS, RUNG_TIME = "150 updates", "1 min"  # those of the ladder


@dataclass(frozen=True)
class Change:
    """A named change of some settings, and what takes it back."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __call__(self, profile: Profile) -> Profile:
        """`profile` with the change."""
        return profile.replace(
            model=profile.model.replace(**self.model), train=profile.train.replace(**self.train)
        )

    def undone(self, profile: Profile, before: Profile) -> Profile:
        """`profile` with the fields of the change as they are in `before`."""
        model = {name: getattr(before.model, name) for name in self.model}
        train = {name: getattr(before.train, name) for name in self.train}
        return Change(self.name, model, train)(profile)


LADDER = (
    Change("pre-norm", {"residual": "pre", "exit_norm": True}),
    Change("scaled init", {"init": "scaled"}),
    Change("one exit an update", train={"exits_trained": "one"}),
    Change("conv after norm", {"conv_after_norm": True}),
    Change("no pointwise", {"pointwise": False}),
    Change("full-width embedding", {"embed_dim": 128}),
    Change("muon", train={"optimizer": "muon"}),
    Change("rotary", {"positions": "rotary"}),
    Change("injection", {"injection": True}),
)

VARIANTS = (
    Change("no norm at the exits", {"exit_norm": False}),
    Change("half-width embedding, d = 168", {"embed_dim": 84, "d_model": 168}),
    Change("swiglu", {"activation": "swiglu"}),
    Change("mlp ratio 2", {"mlp_ratio": 2}),
    Change("mlp ratio 8", {"mlp_ratio": 8}),
    Change("shared cycles", {"share_cycle_weights": True}),
    Change("1 cycle", {"n_cycles": 1}),
    Change("3 cycles", {"n_cycles": 3}),
    Change("no embedding cycle", {"n_embed_cycles": 0}),
    Change("2 embedding cycles", {"n_embed_cycles": 2}),
    Change("prelude for the embedding cycle", {"n_prelude": 1, "n_embed_cycles": 0}),
    Change("lambda 0.1", train={"aux_weight": 0.1}),
    Change("lambda 0.5", train={"aux_weight": 0.5}),
    Change("uniform loops", train={"loop_sampling": "uniform"}),
    Change("poisson loops", train={"loop_sampling": "poisson"}),
    Change("dropout 0.1", {"dropout": 0.1, "attention_dropout": 0.0}),
    Change("attention dropout 0.1", {"attention_dropout": 0.1}),
    Change("embedding dropout 0.1", {"embed_dropout": 0.1}),
)

DEPTHS = (
    Change("1 loop", {"n_loops": 1, "exit_loops": ()}),
    Change("3 blocks, not shared", {"n_loops": 1, "exit_loops": (), "n_prelude": 2}),
    Change("2 loops", {"n_loops": 2, "exit_loops": (1,)}),
    Change("2 loops of 4 cycles", {"n_loops": 2, "exit_loops": (1,), "n_cycles": 4}),
    Change("3 loops", {"n_loops": 3, "exit_loops": (1, 2)}),
    Change("no exits", {"exit_loops": ()}),
    Change("8 loops", {"n_loops": 8, "exit_loops": (2, 4, 6)}),
)

THREE_LOOPS = {"n_loops": 3, "exit_loops": (1, 2)}
ABLATIONS = {  # question -> what is changed, in the paper's block and in crt2
    "TRM": tuple(  # Table 3, 3 loops
        Change(f"TRM {name}", {"trm": name, **THREE_LOOPS})
        for name in ("linear", "conv", "conv_linear", "depthwise", "depthwise_mlp")
    ),
    "norm": (
        Change("batch norm", {"norm": "batch"}),
        Change("no norm", {"norm": "none"}),
        Change("rms norm", {"norm": "rms"}),
    ),
    "convolution": (
        Change("4 cycles", {"n_cycles": 4}),  # the others have two, which never reach 4 and 8
        Change("4 cycles, dilations 1", {"n_cycles": 4, "dilations": (1,)}),
        Change("kernel 5", {"kernel_size": 5}),
    ),
    "embedding": (Change("plain embedding", {"n_embed_cycles": 0, "embed_dim": 128}),),
    "heads": (
        Change("separate heads", {"head_sharing": "separate"}),
        Change("shared early heads", {"head_sharing": "shared_aux"}),
    ),
    "supervision": tuple(
        Change(f"lambda {weight:g}", train={"aux_weight": weight}) for weight in (0.0, 0.1, 0.5)
    ),
    "cycles": (Change("shared cycles", {"share_cycle_weights": True}),),
    "loops": tuple(
        Change(f"{loops} loops", {"n_loops": loops, "exit_loops": exits})
        for loops, exits in ((2, (1,)), (3, (1, 2)), (6, (2, 4)), (8, (2, 4, 6)), (12, (4, 8)))
    ),
}


def search_base() -> Profile:
    """The size at which the search is made: the paper's block, 0.6M tokens of WikiText-2."""
    small = load_profile("small", "paper")
    model = load_profile("quick", "paper").model.replace(n_loops=4, exit_loops=(1, 2, 3))
    config = small.train.replace(updates=300, eval_every=0, eval_tokens=65_536)
    return small.replace(model=model, train=config)


def arms() -> dict[str, dict[str, Profile]]:
    """Every arm by group and name.

    ladder: the released block, which sees the future, the same made causal (`paper`), then each
    change added to those before it; with the last of them it is `crt2`. All have tied heads, one
    embedding cycle and no dropout. without: `crt2` with one change taken back. variants, depth:
    `crt2` with another one. baselines: what `crt2` is held against, at equal parameters and, a
    GPT-2 of 7 layers, at equal multiply-adds. paper-ablations, crt2-ablations: one change of
    ABLATIONS in either. leaking: those of Table 3 as released, so that they see the future.
    """
    base = search_base()
    ladder = {"released": base.replace(model=base.model.replace(causal=False)), "paper": base}
    profile = base
    for change in LADDER:
        profile = change(profile)
        ladder[f"+ {change.name}"] = profile
    crt2 = ladder["crt2"] = ladder.pop(f"+ {LADDER[-1].name}")

    def gpt2(
        d: int, layers: int, optimizer: str = "adamw", kind: Literal["gpt2", "shared"] = "gpt2"
    ) -> Profile:
        model = GPT2Config(
            d_model=d, n_heads=d // 16, n_layers=layers, max_seq_len=256, dropout=0.0, kind=kind
        )
        return base.replace(model=model, train=base.train.replace(optimizer=optimizer))

    def ablations(recipe: str) -> dict[str, Profile]:
        changes = (change for group in ABLATIONS.values() for change in group)
        return {f"{recipe}, {change.name}": change(ladder[recipe]) for change in changes}

    return {
        "ladder": ladder,
        "without": {f"without {c.name}": c.undone(crt2, base) for c in LADDER},
        "variants": {change.name: change(crt2) for change in VARIANTS},
        "depth": {change.name: change(crt2) for change in DEPTHS},
        "baselines": {
            "paper, d = 160": base.replace(model=base.model.replace(d_model=160)),
            "GPT-2 112 x 4": gpt2(112, 4),
            "GPT-2 128 x 3": gpt2(128, 3),
            "GPT-2 112 x 4, muon": gpt2(112, 4, "muon"),
            "GPT-2 128 x 7": gpt2(128, 7),
            "GPT-2 128 x 7, muon": gpt2(128, 7, "muon"),
            "shared layer, 144 x 8": gpt2(144, 8, kind="shared"),
            "shared layer, 144 x 8, muon": gpt2(144, 8, "muon", "shared"),
        },
        "paper-ablations": ablations("paper"),
        "crt2-ablations": ablations("crt2"),
        "leaking": {
            f"released, {change.name}": change(ladder["released"]) for change in ABLATIONS["TRM"]
        },
    }


def choose_arms(names: Sequence[str]) -> dict[str, Profile]:
    """The arms of these names or groups, in order; raises InputError for an unknown one."""
    groups = arms()
    every = {name: profile for group in groups.values() for name, profile in group.items()}
    chosen: dict[str, Profile] = {}
    for name in names:
        if name not in groups and name not in every:
            known = "; ".join(f"{group}: {', '.join(members)}" for group, members in groups.items())
            raise InputError(f"unknown arm {name!r}; choose a group or an arm of {known}")
        chosen |= groups.get(name) or {name: every[name]}
    return chosen
