"""Configurations: they survive JSON, and bad ones are one clear error."""

import json

import pytest
from hypothesis import given, settings, strategies as st
from tiny_models import ALL_OPTIONS, TINY, VALUES, random_ids

from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.model import CRT

NUMBERS = {
    "vocab_size": st.integers(1, 100_000),
    "n_cycles": st.integers(1, 9),
    "n_embed_cycles": st.integers(0, 4),
    "dilations": st.lists(st.integers(1, 16), min_size=1, max_size=5).map(tuple),
    "dropout": st.floats(0, 0.99),
    "attention_dropout": st.none() | st.floats(0, 0.99),
    "embed_dropout": st.floats(0, 0.99),
    "init": st.sampled_from(["torch", "scaled"]),
}


@settings(max_examples=60)
@given(
    options=st.fixed_dictionaries({k: st.sampled_from(of) for k, of in VALUES.items()} | NUMBERS),
    heads=st.integers(1, 8),
    loops=st.integers(1, 9),
    data=st.data(),
)
def test_a_config_survives_json(options, heads, loops, data):
    exits = sorted(data.draw(st.sets(st.integers(1, loops))) - {loops})
    shape = {"d_model": 4 * heads, "n_heads": heads, "n_loops": loops, "exit_loops": tuple(exits)}
    config = ModelConfig(**options, **shape)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.head_loops == (*exits, loops)


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
    ({"dropout": float("nan")}, "dropout is nan"),
    ({"depth": 8}, "'depth'.*n_loops"),
    ({"d_model": "512"}, "d_model"),
    ({"n_loops": 2.5}, "n_loops.*2.5"),
    ({"vocab_size": None}, "vocab_size"),
    ({"causal": "no"}, "causal"),
    ({"dilations": [1.5]}, "dilations"),
    ({"exit_loops": 2}, "exit_loops"),
    ({"d_model": 6, "n_heads": 2, "positions": "rotary"}, "rotary.*d_model / n_heads is 3.*even"),
    ({"embed_dim": 0}, "embed_dim is 0; it must be at least 1"),
    ({"embed_dim": 1.5}, "embed_dim is 1.5"),
    ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout is -0.1; it must be in \[0, 1\)"),
    ({"attention_dropout": 1.0}, r"attention_dropout is 1.0; it must be in \[0, 1\)"),
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


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=str)
def test_a_bad_config_is_one_clear_error(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_dict(ModelConfig().to_dict() | changes)
    assert "\n" not in str(caught.value)


def test_an_even_head_width_is_enough_for_rotary():
    CRT(TINY.replace(d_model=6, n_heads=3, positions="rotary"))(random_ids(1, 5))


def test_an_older_configuration_has_none_of_the_options():
    options = set(ALL_OPTIONS) - {"head_sharing"} | {"init", "attention_dropout", "embed_dropout"}
    stored = {name: value for name, value in TINY.to_dict().items() if name not in options}
    assert len(stored) == len(TINY.to_dict()) - len(options)
    assert ModelConfig.from_dict(stored) == TINY
