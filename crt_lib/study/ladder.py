"""The arms of the search: the ladder from `paper` to `crt2`, and what was tried around `crt2`.

All at one small size, d = 128, in updates of 2,048 tokens of WikiText-2, unless an arm is about
size. `crt search` runs them. ladder.toml, beside this file, has what each changes.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crt_lib.config import GPT2Config
from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile, load_profile

EQUAL_TOKENS, EQUAL_TIME = "300 updates", "2 min"  # the budgets at which baselines are compared
RUNG_TOKENS, RUNG_TIME = "150 updates", "1 min"  # those of the ladder

Changes = dict[str, dict[str, Any]]  # name -> fields of the model's and the training's settings
GROUPS = tomllib.loads(Path(__file__).with_name("ladder.toml").read_text(encoding="utf-8"))
LADDER: Changes = GROUPS["ladder"]
ABLATIONS: dict[str, Changes] = GROUPS["ablations"]  # by the question that they answer
FAMILIES = {  # how an arm's name begins -> whose it is; of no other, it is of `crt2`
    "GPT-2": "GPT-2",
    "shared layer": "the shared layer",
    "paper": "the paper's block",
    "released": "the released block",
}


def changed(profile: Profile, settings: dict[str, Any]) -> Profile:
    """`profile` with these of its corpus and tokenizer, and fields of its training and model."""
    own = {name: settings[name] for name in ("corpus", "tokenizer") if name in settings}
    train = {name: value for name, value in settings.items() if hasattr(profile.train, name)}
    model = {name: of for name, of in settings.items() if name not in train and name not in own}
    return profile.replace(
        **own, model=profile.model.replace(**model), train=profile.train.replace(**train)
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
    gpt2 = base.replace(model=GPT2Config(max_seq_len=256, dropout=0.0))
    profile, ladder = base, {"released": changed(base, {"causal": False}), "paper": base}
    for name, settings in LADDER.items():
        profile = ladder[f"+ {name}"] = changed(profile, settings)
    ladder["crt2"] = ladder.pop(f"+ {name}")
    before = vars(base.model) | vars(base.train)
    back = {name: {field: before[field] for field in of} for name, of in LADDER.items()}
    every = {name: settings for part in ABLATIONS.values() for name, settings in part.items()}
    return {
        "ladder": ladder,
        "without": _each(back, profile, "without "),
        "variants": _each(GROUPS["variants"], profile),
        "depth": _each(GROUPS["depth"], profile),
        "baselines": _each({"paper, d = 160": {"d_model": 160}}, base)
        | _each(GROUPS["baselines"], gpt2),
        "paper-ablations": _each(every, base, "paper, "),
        "crt2-ablations": _each(every, profile, "crt2, "),
        "leaking": _each(ABLATIONS["TRM"], ladder["released"], "released, "),
    }


def _each(changes: Changes, profile: Profile, before: str = "") -> dict[str, Profile]:
    return {before + name: changed(profile, settings) for name, settings in changes.items()}


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
