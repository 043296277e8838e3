"""Profiles and recipes, and the arms of the search."""

import json
from pathlib import Path

import pytest

from crt_lib import (
    CRT,
    InputError,
    ModelConfig,
    TrainConfig,
    load,
    load_profile,
    load_tokenizer,
    tokenize,
)
from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.runs.profiles import RECIPES, Profile
from crt_lib.study.ladder import LADDER, arms, choose_arms

STORED = Path(__file__).parents[2] / "results" / "small"


@pytest.mark.parametrize("name", ["smoke", "quick", "small", "paper"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_in_every_size(name, recipe):
    profile = load_profile(name, recipe)
    assert (profile.name, profile.recipe) == (name, recipe)
    released = recipe == "released"
    assert getattr(profile.model, "causal", True) == (not released)
    assert (profile.train.batching == "padded") == (released and name != "smoke")
    assert profile.train.eval_tokens is None  # every arm is chosen on all of valid
    again = profile.to_dict() | {"model": profile.model, "train": profile.train}
    assert Profile.from_dict(again) == profile


@pytest.mark.parametrize("recipe", RECIPES)
def test_stored_settings_still_load(recipe):
    stored = json.loads((STORED / recipe / "config.json").read_text())["train"]
    assert TrainConfig.from_dict(stored).eval_tokens == stored["eval_tokens"] == 32_768


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_profile([]), "unknown profile"),
        (lambda: load_profile("huge"), "'huge'.*smoke, quick, small, paper"),
        (lambda: load_profile("smoke", []), "unknown recipe"),
        (lambda: load_profile("smoke", "crt3"), "'crt3'.*released, paper, crt2"),
        (lambda: choose_arms(["ladder", "crt3"]), "unknown arm 'crt3'.*swiglu"),
        (lambda: load(None), "None is not the path of a run"),
        (lambda: load_tokenizer(None, None), "the corpus is None"),
        (lambda: tokenize(None, None), "not None and None"),
    ],
)
def test_what_is_no_name_path_or_corpus_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_recipe_without_a_word():
    assert load_profile("paper").model == ModelConfig()
    assert load_profile("paper", "released").model.head_sharing == "separate"
    for name in ("smoke", "quick", "small"):
        assert load_profile(name).recipe == "crt2"


def test_the_published_counts():
    counts = {
        recipe: sum(parameters_by_part(load_profile("paper", recipe).model).values())
        for recipe in ("released", "paper", "gpt2")
    }
    assert counts == {"released": 143_516_928, "paper": 92_053_760, "gpt2": 124_439_808}


@pytest.mark.parametrize(("name", "vocabulary"), [("quick", 2048), ("small", 8192)])
def test_the_gpt2_of_equal_parameters(name, vocabulary):
    def size(recipe, **changes):
        config = load_profile(name, recipe).model.replace(vocab_size=vocabulary, **changes)
        return sum(parameters_by_part(config).values())

    def apart(layers):
        return abs(size("gpt2", n_layers=layers) - size("crt2"))

    assert apart(2) < min(apart(1), apart(3))
    assert apart(2) < 0.1 * size("crt2")


def test_small_crt2_is_under_20_megabytes():
    model = load_profile("small").model.replace(vocab_size=8192)
    assert sum(parameters_by_part(model).values()) * 4 < 20e6


def test_the_ladder_ends_at_crt2():
    released, paper, *_, top = arms()["ladder"].values()
    assert not released.model.causal and paper.model == released.model.replace(causal=True)
    crt2 = load_profile("quick")
    small = {"vocab_size", "max_seq_len"}
    ours, theirs = top.model.to_dict(), crt2.model.to_dict()
    assert {k: v for k, v in ours.items() if k not in small} == {
        k: v for k, v in theirs.items() if k not in small
    }
    for name in ("optimizer", "exits_trained", "loop_sampling", "aux_weight", "betas"):
        assert getattr(top.train, name) == getattr(crt2.train, name)


def test_a_rung_taken_back_is_the_rung_below():
    groups = arms()
    *_, below, _ = groups["ladder"].values()
    *_, last = groups["without"].values()
    assert last == below
    assert len(groups["ladder"]) == len(LADDER) + 2


def test_arms_have_names_of_their_own_and_build():
    groups = arms()
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names)) and not set(names) & set(groups)
    chosen = choose_arms(["variants", "paper"])
    assert list(chosen)[-1] == "paper"
    for profile in choose_arms(
        ["ladder", "without", "variants", "depth", "crt2-ablations", "leaking"]
    ).values():
        CRT(profile.model.replace(vocab_size=50))


def test_the_baselines_of_equal_parameters_and_of_equal_multiply_adds():
    groups = arms()

    def config(profile):
        return profile.model.replace(vocab_size=8192)

    def parameters(profile):
        return sum(parameters_by_part(config(profile)).values())

    def cost(profile):
        return sum(multiply_adds(config(profile), 256, (profile.model.n_loops,)).values())

    crt2, baselines = groups["ladder"]["crt2"], groups["baselines"]
    for name in ("paper, d = 160", "GPT-2 112 x 4", "shared layer, 144 x 8"):
        assert parameters(baselines[name]) == pytest.approx(parameters(crt2), rel=0.05)
    assert cost(baselines["GPT-2 128 x 7"]) == pytest.approx(cost(crt2), rel=0.05)
    for name in ("GPT-2 112 x 4", "GPT-2 128 x 7", "shared layer, 144 x 8"):
        assert baselines[f"{name}, muon"].model == baselines[name].model
