"""The arms of the search: the ladder from `paper` to `crt2`, and what was tried around `crt2`.

All at one small size, d = 128, in updates of 2,048 tokens of WikiText-2, unless an arm is about
size. `crt search` runs them.
"""

from collections.abc import Sequence
from typing import Any

from crt_lib.config import GPT2Config
from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile, load_profile

EQUAL_TOKENS, EQUAL_TIME = "300 updates", "2 min"  # the budgets at which baselines are compared
RUNG_TOKENS, RUNG_TIME = "150 updates", "1 min"  # those of the ladder

Changes = dict[str, dict[str, Any]]  # name -> fields of the model's and the training's settings
LOOPS = {  # name -> how many, and the exits before the last
    f"{loops} loops": {"n_loops": loops, "exit_loops": exits}
    for loops, exits in ((2, (1,)), (3, (1, 2)), (6, (2, 4)), (8, (2, 4, 6)), (12, (4, 8)))
}

LADDER: Changes = {
    "pre-norm": {"residual": "pre", "exit_norm": True},
    "scaled init": {"init": "scaled"},
    "one exit an update": {"exits_trained": "one"},
    "conv after norm": {"conv_after_norm": True},
    "no pointwise": {"pointwise": False},
    "full-width embedding": {"embed_dim": 128},
    "muon": {"optimizer": "muon"},
    "rotary": {"positions": "rotary"},
    "injection": {"injection": True},
}
VARIANTS: Changes = {
    "no norm at the exits": {"exit_norm": False},
    "half-width embedding, d = 168": {"embed_dim": 84, "d_model": 168},
    "swiglu": {"activation": "swiglu"},
    "mlp ratio 2": {"mlp_ratio": 2},
    "mlp ratio 8": {"mlp_ratio": 8},
    "shared cycles": {"share_cycle_weights": True},
    "1 cycle": {"n_cycles": 1},
    "3 cycles": {"n_cycles": 3},
    "no embedding cycle": {"n_embed_cycles": 0},
    "2 embedding cycles": {"n_embed_cycles": 2},
    "prelude for the embedding cycle": {"n_prelude": 1, "n_embed_cycles": 0},
    "lambda 0.1": {"aux_weight": 0.1},
    "lambda 0.5": {"aux_weight": 0.5},
    "uniform loops": {"loop_sampling": "uniform"},
    "poisson loops": {"loop_sampling": "poisson"},
    "dropout 0.1": {"dropout": 0.1, "attention_dropout": 0.0},
    "attention dropout 0.1": {"attention_dropout": 0.1},
    "embedding dropout 0.1": {"embed_dropout": 0.1},
}
DEPTHS: Changes = {
    "1 loop": {"n_loops": 1, "exit_loops": ()},
    "3 blocks, not shared": {"n_loops": 1, "exit_loops": (), "n_prelude": 2},
    "2 loops": LOOPS["2 loops"],
    "2 loops of 4 cycles": {**LOOPS["2 loops"], "n_cycles": 4},
    "3 loops": LOOPS["3 loops"],
    "no exits": {"exit_loops": ()},
    "8 loops": LOOPS["8 loops"],
}
ABLATIONS: dict[str, Changes] = {  # question -> what is changed, in the paper's block and in crt2
    "TRM": {  # Table 3, 3 loops
        f"TRM {name}": {"trm": name, **LOOPS["3 loops"]}
        for name in ("linear", "conv", "conv_linear", "depthwise", "depthwise_mlp")
    },
    "norm": {
        "batch norm": {"norm": "batch"},
        "no norm": {"norm": "none"},
        "rms norm": {"norm": "rms"},
    },
    "convolution": {
        "4 cycles": {"n_cycles": 4},  # the others have two, which never reach 4 and 8
        "4 cycles, dilations 1": {"n_cycles": 4, "dilations": (1,)},
        "kernel 5": {"kernel_size": 5},
    },
    "embedding": {"plain embedding": {"n_embed_cycles": 0, "embed_dim": 128}},
    "heads": {
        "separate heads": {"head_sharing": "separate"},
        "shared early heads": {"head_sharing": "shared_aux"},
    },
    "supervision": {f"lambda {weight:g}": {"aux_weight": weight} for weight in (0.0, 0.1, 0.5)},
    "cycles": {"shared cycles": {"share_cycle_weights": True}},
    "loops": LOOPS,
}
BASELINES = {  # name -> width, layers, optimizer; of a shared layer, how often it is applied
    "GPT-2 112 x 4": (112, 4, "adamw"),
    "GPT-2 128 x 3": (128, 3, "adamw"),
    "GPT-2 112 x 4, muon": (112, 4, "muon"),
    "GPT-2 128 x 7": (128, 7, "adamw"),
    "GPT-2 128 x 7, muon": (128, 7, "muon"),
    "shared layer, 144 x 8": (144, 8, "adamw"),
    "shared layer, 144 x 8, muon": (144, 8, "muon"),
}


FAMILIES = {  # how an arm's name begins -> whose it is; of no other, it is of `crt2`
    "GPT-2": "GPT-2",
    "shared layer": "the shared layer",
    "paper": "the paper's block",
    "released": "the released block",
}


def family(arm: str) -> str:
    """Whose an arm is, of FAMILIES, or that of `crt2` and what was tried on the way and around."""
    ours = "`crt2`, its rungs and variants"
    return next((name for begin, name in FAMILIES.items() if arm.startswith(begin)), ours)


def changed(profile: Profile, settings: dict[str, Any]) -> Profile:
    """`profile` with these fields of its training and of its model."""
    train = {name: value for name, value in settings.items() if hasattr(profile.train, name)}
    model = {name: value for name, value in settings.items() if name not in train}
    return profile.replace(
        model=profile.model.replace(**model), train=profile.train.replace(**train)
    )


def arms() -> dict[str, dict[str, Profile]]:
    """Every arm by group and name.

    ladder: the released block, which sees the future, the same made causal (`paper`), then each
    change added to those before it; with the last of them it is `crt2`. All have tied heads, one
    embedding cycle and no dropout. without: `crt2` with one change taken back. variants, depth:
    `crt2` with another one. baselines: what `crt2` is held against, at equal parameters and, a
    GPT-2 of 7 layers, at equal multiply-adds. paper-ablations, crt2-ablations: one change of
    ABLATIONS in either. leaking: those of Table 3 as released, so that they see the future.
    """
    base = load_profile("small", "paper").replace(model=load_profile("quick", "paper").model)
    size = {"n_loops": 4, "exit_loops": (1, 2, 3), "updates": 300, "eval_tokens": 65_536}
    base = changed(base, size | {"eval_every": 0})
    profile, ladder = base, {"released": changed(base, {"causal": False}), "paper": base}
    for name, settings in LADDER.items():
        profile = ladder[f"+ {name}"] = changed(profile, settings)
    ladder["crt2"] = ladder.pop(f"+ {name}")
    before = vars(base.model) | vars(base.train)
    without = {
        f"without {name}": changed(profile, {field: before[field] for field in settings})
        for name, settings in LADDER.items()
    }
    every = {name: settings for part in ABLATIONS.values() for name, settings in part.items()}
    return {
        "ladder": ladder,
        "without": without,
        "variants": _each(VARIANTS, profile),
        "depth": _each(DEPTHS, profile),
        "baselines": {"paper, d = 160": changed(base, {"d_model": 160})} | _baselines(base),
        "paper-ablations": _each(every, base, "paper, "),
        "crt2-ablations": _each(every, profile, "crt2, "),
        "leaking": _each(ABLATIONS["TRM"], ladder["released"], "released, "),
    }


def _each(changes: Changes, profile: Profile, before: str = "") -> dict[str, Profile]:
    return {before + name: changed(profile, settings) for name, settings in changes.items()}


def _baselines(base: Profile) -> dict[str, Profile]:
    made = {}
    for name, (width, layers, optimizer) in BASELINES.items():
        model = GPT2Config(
            d_model=width,
            n_heads=width // 16,
            n_layers=layers,
            max_seq_len=256,
            dropout=0.0,
            kind="shared" if name.startswith("shared") else "gpt2",
        )
        made[name] = base.replace(model=model, train=base.train.replace(optimizer=optimizer))
    return made


def choose_arms(names: Sequence[str]) -> dict[str, Profile]:
    """The arms of these names or groups, in order; raises InputError for an unknown one."""
    groups = arms()
    every = {name: profile for group in groups.values() for name, profile in group.items()}
    chosen: dict[str, Profile] = {}
    if not names:
        raise InputError(f"no arm; name some, or groups: {', '.join(groups)}")
    for name in names:
        if name not in groups and name not in every:
            known = "; ".join(f"{group}: {', '.join(members)}" for group, members in groups.items())
            raise InputError(f"unknown arm {name!r}; choose a group or an arm of {known}")
        chosen |= groups.get(name) or {name: every[name]}
    return chosen
