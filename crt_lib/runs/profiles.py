"""The profiles, scales at which the whole project runs, and the recipes they are trained by."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from crt_lib.config import GPT2Config, ModelConfig, Settings, TrainConfig, config_from_dict
from crt_lib.files import InputError, sha256

RECIPES = {
    "released": "the paper's architecture as its code was released: it sees the future",
    "paper": "Table 1, made causal",
    "crt2": "the corrected recipe",
    "gpt2": "a GPT-2 as large as crt2, trained as it is; at the size paper, GPT-2 Small",
}


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
    profiles = {profile.name: profile for profile in _paper_profiles()}
    if recipe is None:
        recipe = "paper" if name == "paper" else "crt2"
    if name not in [*profiles]:
        raise InputError(f"unknown profile {name!r}; choose one of {', '.join(profiles)}")
    if recipe not in [*RECIPES]:
        raise InputError(f"unknown recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    make = {"released": _released, "crt2": _crt2, "gpt2": _gpt2}.get(recipe)
    profile = profiles[name].replace(recipe=recipe)
    return make(profile) if make else profile


def _released(profile: Profile) -> Profile:
    """As the released script trains: symmetric convolutions, a padded line a row, padding scored.

    The text of `smoke` has no line that the script would keep, so there windows stay packed.
    """
    model = profile.model.replace(causal=False, head_sharing="separate")
    train = profile.train
    if profile.name != "smoke":
        train = train.replace(batching="padded")
    if profile.name == "small":
        train = train.replace(seq_len=384, batch_size=4)
    return profile.replace(model=model, train=train)


def _crt2(profile: Profile) -> Profile:
    """The corrected recipe in the size of `profile`; `crt search` measures its parts.

    Chosen at d = 128 and 256; at the size `paper` it is an extrapolation that nothing has tested.
    """
    model = profile.model.replace(
        residual="pre",
        exit_norm=True,
        init="scaled",
        conv_after_norm=True,
        pointwise=False,
        positions="rotary",
        injection=True,
        head_sharing="tied",
        embed_dim=profile.model.d_model,
    )
    train = profile.train.replace(optimizer="muon", exits_trained="one", max_lr=1.6e-2)
    if profile.name in ("quick", "small"):
        model = model.replace(n_loops=4, n_cycles=2, exit_loops=(1, 2, 3))
    if (
        profile.name == "small"
    ):  # with 3 loops, or dropout, worse on a slice: results/small/tried.csv
        model = model.replace(dropout=0.0)
        train = train.replace(updates=4500, max_lr=1e-2, eval_every=500)
    return profile.replace(model=model, train=train)


def _gpt2(profile: Profile) -> Profile:
    """The baseline: what `crt2` has of parameters, two layers of the same width come nearest to."""
    if profile.name == "paper":
        return profile.replace(model=GPT2Config())
    size = profile.model
    model = GPT2Config(d_model=size.d_model, n_heads=size.n_heads, n_layers=2, dropout=0.0)
    model = model.replace(max_seq_len=size.max_seq_len)
    rate = 4e-3 if profile.name == "small" else 8e-3  # the best of four: results/small/tried.csv
    return profile.replace(model=model, train=_crt2(profile).train.replace(max_lr=rate))


def _paper_profiles() -> list[Profile]:
    """The paper's architecture in every size."""
    tiny = ModelConfig(d_model=32, n_heads=2, max_seq_len=128, head_sharing="tied")
    smoke = tiny.replace(n_loops=4, n_cycles=2, n_embed_cycles=1, exit_loops=(1, 2, 3))
    quick = smoke.replace(
        d_model=128, n_heads=4, n_loops=8, max_seq_len=256, exit_loops=(2, 4, 6), dropout=0.0
    )
    small = quick.replace(d_model=256, n_heads=8, max_seq_len=512, dropout=0.1)
    small = small.replace(n_loops=4, n_cycles=4, exit_loops=(1, 2, 3))
    short = TrainConfig(seq_len=64, batch_size=8, grad_accum=1, max_lr=1e-3)
    of_smoke = short.replace(updates=30, max_lr=3e-3, eval_every=10, checkpoint_every=10)
    of_quick = short.replace(seq_len=256, updates=300, eval_every=75, checkpoint_every=50)
    of_small = short.replace(seq_len=256, updates=1600, eval_every=100, checkpoint_every=50)
    of_paper = TrainConfig(gradient_checkpointing=True)
    return [
        Profile("smoke", "grammar", "word", smoke, of_smoke),
        Profile("quick", "docstrings", "bpe:2048", quick, of_quick, released_lines=200),
        Profile("small", "wikitext-2", "bpe:8192", small, of_small),
        Profile("paper", "wikitext-103", "gpt2", ModelConfig(), of_paper),
    ]
