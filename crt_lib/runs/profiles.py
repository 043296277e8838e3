"""The profiles, scales at which the whole project runs, and the recipes they are trained by.

Their settings, and the reasons, are in `profiles.toml`.
"""

import json
import tomllib
from collections import ChainMap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crt_lib.config import GPT2Config, ModelConfig, Settings, TrainConfig, config_from_dict
from crt_lib.files import InputError, sha256

_STORED = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
PROFILES, RECIPES = _STORED["profiles"], _STORED["recipes"]  # by name


@dataclass(frozen=True)
class Profile(Settings):
    """A scale at which the whole project runs: what is trained, on what, for how long."""

    name: str
    corpus: str  # a name `load_corpus` takes
    tokenizer: str  # a name `load_tokenizer` takes: "gpt2", "bpe:<vocabulary>" or "word"
    model: ModelConfig | GPT2Config  # vocab_size is replaced by the tokenizer's
    train: TrainConfig
    recipe: Literal["released", "paper", "crt2", "gpt2"] = "paper"
    released_lines: int | None = None  # of valid and test that the released protocol scores; all

    def __post_init__(self) -> None:
        self._check_types()

    def record(self) -> dict[str, Any]:
        """What the manifest of a run keeps of it, JSON-able."""
        from crt_lib.audit.accounting import parameters_by_part

        return {
            "profile": self.name,
            "recipe": self.recipe,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
            "parameters": sum(parameters_by_part(self.model).values()),
        }

    def fingerprint(self) -> str:
        """Twelve characters that differ where what is trained does, and are never a number.

        Of what is not at its default, so that a setting that comes later changes none; not of the
        precision, which is the machine's: the stored rows were trained in bf16.
        """
        settings = (self.model, self.train.replace(precision="bf16"))
        changed = [
            {name: value for name, value in own.to_dict().items() if value != default[name]}
            for own, default in ((s, type(s)().to_dict()) for s in settings)
        ]
        told = json.dumps([*changed, self.corpus, self.tokenizer], sort_keys=True)
        return "s" + sha256(told.encode())[:11]

    def matches(self, record: dict[str, Any]) -> bool:
        """Whether a record has these settings; fields that it has not are at their defaults."""
        model, train = config_from_dict(record["model"]), TrainConfig.from_dict(record["train"])
        return (model, train) == (self.model, self.train)


def load_profile(name: str, recipe: str | None = None) -> Profile:
    """The profile `name` (smoke, quick, small or paper) in a recipe of RECIPES.

    Without `recipe`: `crt2`, and for the profile `paper` the paper's own. Raises InputError for
    other names.
    """
    if recipe is None:
        recipe = "paper" if name == "paper" else "crt2"
    for what, value, known in (("profile", name, PROFILES), ("recipe", recipe, RECIPES)):
        if value not in [*known]:
            raise InputError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
    changes = [RECIPES[recipe].get(name, {}), RECIPES[recipe]]
    model, train = (
        ChainMap(*(layer.get(part, {}) for layer in (*changes, PROFILES[name])))
        for part in ("model", "train")
    )
    if "kind" in model:  # another model than the profile's
        model = ChainMap(*model.maps[:-1])
    own = {"model": config_from_dict(dict(model)), "train": TrainConfig.from_dict(dict(train))}
    return Profile.from_dict(PROFILES[name] | own | {"name": name, "recipe": recipe})
