"""Configurations: they survive JSON, and bad ones are one clear error."""

import json

import pytest
from hypothesis import given, settings, strategies as st
from tiny_models import ALL_OPTIONS, NORMS, SHARINGS, TINY, VARIANTS, random_ids

from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.model import CRT


@st.composite
def configs(draw) -> ModelConfig:
    n_heads, n_loops = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    exits = draw(st.sets(st.integers(1, n_loops)))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 100_000)),
        d_model=2 * n_heads * draw(st.integers(1, 64)),
        n_heads=n_heads,
        n_loops=n_loops,
        n_cycles=draw(st.integers(1, 9)),
        n_embed_cycles=draw(st.integers(0, 4)),
        kernel_size=2 * draw(st.integers(0, 4)) + 1,
        dilations=tuple(draw(st.lists(st.integers(1, 16), min_size=1, max_size=5))),
        exit_loops=tuple(sorted(exits - {n_loops})),
        head_sharing=draw(st.sampled_from(SHARINGS)),
        trm=draw(st.sampled_from(VARIANTS)),
        norm=draw(st.sampled_from(NORMS)),
        share_cycle_weights=draw(st.booleans()),
        causal=draw(st.booleans()),
        dropout=draw(st.floats(0, 0.99)),
        residual=draw(st.sampled_from(["post", "pre"])),
        init=draw(st.sampled_from(["torch", "scaled"])),
        conv_after_norm=draw(st.booleans()),
        pointwise=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        positions=draw(st.sampled_from(["learned", "rotary"])),
        injection=draw(st.booleans()),
        n_prelude=draw(st.integers(0, 4)),
        embed_dim=draw(st.none() | st.integers(1, 1024)),
        exit_norm=draw(st.booleans()),
        attention_dropout=draw(st.none() | st.floats(0, 0.99)),
        embed_dropout=draw(st.floats(0, 0.99)),
    )


@settings(max_examples=60)
@given(config=configs())
def test_a_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.head_loops == (*config.exit_loops, config.n_loops)


BAD_CONFIGS = [
    ({"d_model": 510, "n_heads": 8}, "510.*n_heads 8"),
    ({"d_model": 15, "n_heads": 3}, "15.*even"),
    ({"d_model": 0}, "d_model is 0"),
    ({"n_loops": 0}, "n_loops is 0"),
    ({"n_embed_cycles": -1}, "n_embed_cycles is -1"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"kernel_size": 4}, "kernel_size is 4.*odd"),
    ({"dilations": ()}, "dilations"),
    ({"dilations": (1, 0)}, r"dilations are \(1, 0\)"),
    ({"exit_loops": (2, 9)}, "exit loop 9.*1..8"),
    ({"exit_loops": (4, 2)}, r"\(4, 2\)"),
    ({"exit_loops": (2, 8)}, r"\(2, 8\)"),
    ({"head_sharing": "all"}, "'all'.*'tied'"),
    ({"norm": "group"}, "'group'.*'layer'"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"dropout": float("nan")}, "dropout is nan"),
    ({"depth": 8}, "'depth'.*n_loops"),
    ({"d_model": "512"}, "d_model"),
    ({"n_loops": 2.5}, "n_loops.*2.5"),
    ({"vocab_size": None}, "vocab_size"),
    ({"causal": "no"}, "causal"),
    ({"dilations": [1.5]}, "dilations"),
    ({"exit_loops": 2}, "exit_loops"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=lambda value: str(value))
def test_a_bad_config_is_one_clear_error(changes, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict(ModelConfig().to_dict() | changes)


BAD_OPTIONS = [
    ({"d_model": 6, "n_heads": 2, "positions": "rotary"}, "rotary.*d_model / n_heads is 3.*even"),
    ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
    ({"embed_dim": -3}, "embed_dim is -3; it must be at least 1"),
    ({"embed_dim": 1.5}, "embed_dim is 1.5"),
    ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout is -0.1; it must be in \[0, 1\)"),
    ({"attention_dropout": 1.0}, r"attention_dropout is 1.0; it must be in \[0, 1\)"),
    ({"attention_dropout": -0.1}, r"attention_dropout is -0.1; it must be in \[0, 1\)"),
    ({"attention_dropout": float("nan")}, "attention_dropout is nan"),
    ({"attention_dropout": True}, "attention_dropout is True"),
    ({"embed_dropout": 1.5}, r"embed_dropout is 1.5; it must be in \[0, 1\)"),
    ({"embed_dropout": None}, "embed_dropout is None"),
    ({"n_prelude": -1}, "n_prelude is -1; it must be at least 0"),
    ({"residual": "middle"}, "residual is 'middle'.*'pre'"),
    ({"init": "zero"}, "init is 'zero'.*'scaled'"),
    ({"activation": "relu"}, "activation is 'relu'.*'swiglu'"),
    ({"positions": "alibi"}, "positions is 'alibi'.*'rotary'"),
    ({"injection": 0.5}, "injection is 0.5"),
    ({"pointwise": "no"}, "pointwise is 'no'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS, ids=str)
def test_a_bad_option_is_one_clear_error(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        TINY.replace(**changes)
    assert "\n" not in str(caught.value)


def test_an_even_head_width_is_enough_for_rotary():
    CRT(TINY.replace(d_model=6, n_heads=3, positions="rotary"))(random_ids(1, 5))


def test_an_older_configuration_has_none_of_the_options():
    options = set(ALL_OPTIONS) - {"head_sharing"} | {"init", "attention_dropout", "embed_dropout"}
    stored = {name: value for name, value in TINY.to_dict().items() if name not in options}
    assert len(stored) == len(TINY.to_dict()) - len(options)
    assert ModelConfig.from_dict(stored) == TINY
