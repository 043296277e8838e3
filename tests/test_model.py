"""The fast model against the plain reference, its counts, its causality and its bad input."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crt_lib import loss
from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.model import CRT, total_loss
from crt_lib.reference import reference_logits, reference_loss

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


def random_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (rows, length), generator=generator)


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """Same exits, and values within `tolerance` of the larger of 1 and the largest value."""
    assert list(found) == list(expected)
    for loop, values in expected.items():
        assert found[loop].shape == values.shape
        error = (found[loop] - values).abs().max().item()
        assert error <= tolerance * max(1.0, values.abs().max().item()), (loop, error)


def check_logits(model: CRT) -> None:
    """Float32 to 1e-5; float64, where rounding cannot hide a wrong formula, to 1e-12."""
    ids = random_ids(2, 13)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model.to(dtype)
        with torch.no_grad():
            expected = reference_logits(model.state_dict(), model.config, ids)
            assert_close(model(ids), expected, tolerance)


def check_gradients(model: CRT, checkpoint: bool) -> None:
    """The losses of the reference to 1e-5 and its gradients to 1e-4 of their norms."""
    model.train()
    ids, targets = random_ids(3, 13), random_ids(3, 13, seed=2)
    targets[0, -1] = targets[1, 4:] = -100  # two whole chunks among them
    state = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in model.state_dict().items()
    }
    total, expected = reference_loss(state, model.config, ids, targets, 0.3, training=True)
    total.backward()

    model.gradient_checkpointing = checkpoint
    losses = model(ids, targets=targets)
    assert_close(losses, expected, 1e-5)
    combined = total_loss(losses, 0.3)
    torch.testing.assert_close(combined, total, check_dtype=False)
    combined.backward()

    gradients = {name: value.grad for name, value in model.named_parameters()}
    largest = max(state[name].grad.norm().item() for name in gradients)
    for name, found in gradients.items():
        wanted = state[name].grad
        # A bias before a batch norm has no gradient but rounding: compare it with the others'.
        scale = max(wanted.norm().item(), 1e-3 * largest)
        assert (found - wanted).norm().item() <= 1e-4 * scale, name


@pytest.mark.parametrize("trm", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("causal", [True, False])
def test_logits_agree_with_the_reference(causal, sharing, norm, trm):
    check_logits(random_model(causal=causal, head_sharing=sharing, norm=norm, trm=trm))


@pytest.mark.parametrize(
    ("shape", "trm", "causal"), list(itertools.product(SHAPES, VARIANTS, [True, False]))
)
def test_logits_agree_for_other_shapes(shape, trm, causal):
    check_logits(random_model(trm=trm, causal=causal, **SHAPES[shape]))


@pytest.mark.parametrize("changes", (OPTIONS | COMBINATIONS).values(), ids=OPTIONS | COMBINATIONS)
def test_logits_agree_with_options(changes):
    check_logits(random_model(**changes))


@pytest.mark.parametrize("trm", VARIANTS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_batch_norm_trains_on_the_statistics_of_the_batch_once(trm, checkpoint):
    model = random_model(norm="batch", trm=trm).train()
    ids = random_ids(2, 13)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = reference_logits(before, model.config, ids, training=True)
    model.gradient_checkpointing = checkpoint
    logits = model(ids)
    assert_close(logits, expected, 1e-5)
    after_forward = {name: value.clone() for name, value in model.state_dict().items()}
    sum(values.mean() for values in logits.values()).backward()
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, after_forward[name]), f"the backward pass changed {name}"
            assert not torch.equal(value, before[name]), f"{name} did not follow the batch"


@pytest.mark.parametrize(
    ("path", "checkpoint"),
    [
        ("fused", False),
        ("fused", True),
        ("whole", False),
        ("torch's chunks", True),
        ("our chunks", False),
    ],
)
@pytest.mark.parametrize("changes", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_losses_and_gradients_agree_with_the_reference(changes, path, checkpoint, monkeypatch):
    if path == "torch's chunks" and not loss._TORCH_CHUNKS:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(loss, "FUSED_ROWS", 5)  # of the 39 positions
    if path != "fused":
        monkeypatch.setattr(loss, "FUSED_WEIGHTS", 0)
    if path.endswith("chunks"):
        monkeypatch.setattr(loss, "WHOLE_ELEMENTS", 0)
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 5 * TINY.vocab_size)
        monkeypatch.setattr(loss, "_TORCH_CHUNKS", path == "torch's chunks")
    check_gradients(random_model(**changes), checkpoint)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("changes", (OPTIONS | COMBINATIONS).values(), ids=OPTIONS | COMBINATIONS)
def test_losses_and_gradients_agree_with_options(changes, checkpoint):
    # float64: some of the combinations are too ill-conditioned for a tolerance in float32
    check_gradients(random_model(**changes).double(), checkpoint)


@pytest.mark.parametrize("changes", [*({"norm": norm} for norm in NORMS), ALL_OPTIONS], ids=str)
def test_the_reference_recomputes_the_same_gradients(changes):
    model = random_model(**changes, dropout=0.2)
    ids, targets = random_ids(2, 13), random_ids(2, 13, seed=2)
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        total, _ = reference_loss(
            state, model.config, ids, targets, 0.3, training=True, checkpoint=checkpoint
        )
        total.backward()
        gradients.append([value.grad.clone() for value in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_every_parameter_is_used():
    cases = [
        {"head_sharing": sharing, "norm": norm, "trm": trm}
        for sharing, norm, trm in itertools.product(SHARINGS, NORMS, VARIANTS)
    ]
    for changes in [*cases, *OPTIONS.values(), ALL_OPTIONS]:
        model = random_model(**changes)
        losses = model(random_ids(2, 13), targets=random_ids(2, 13, seed=2))
        sum(losses.values()).backward()
        for name, value in model.named_parameters():
            assert value.grad is not None and value.grad.abs().max() > 0, (name, changes)


@pytest.mark.parametrize(
    "changes", [*({"trm": trm, "dropout": 0.3} for trm in VARIANTS), *DROPOUTS.values()], ids=str
)
def test_dropout_acts_where_the_reference_has_it(changes):
    model = random_model(**changes).train()
    draws = 2000
    ids = random_ids(1, 5).expand(draws, 5).contiguous()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = reference_logits(model.state_dict(), model.config, ids, training=True)
        logits = model(ids)
    for loop in model.config.head_loops:
        spread = expected[loop].std(0)  # (T, V)
        error = (logits[loop].mean(0) - expected[loop].mean(0)).abs() / spread
        assert error.max() < 6 * math.sqrt(2 / draws)
        ratio = (logits[loop].std(0) / spread).log()
        assert ratio.mean().abs() < 0.02 and ratio.abs().max() < 0.15


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.2}, {"trm": "conv_linear", "dropout": 0.2}, DROPOUTS["all options"]],
    ids=str,
)
def test_checkpointing_repeats_the_same_dropout(changes):
    model = random_model(**changes).train()
    ids, targets = random_ids(2, 13), random_ids(2, 13, seed=2)
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        model.gradient_checkpointing = checkpoint
        sum(model(ids, targets=targets).values()).backward()
        gradients.append([value.grad.clone() for value in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-7)


def test_asking_for_some_exits_gives_those_of_all():
    model = random_model()
    ids, targets = random_ids(2, 13), random_ids(2, 13, seed=2)
    for arguments in ({}, {"targets": targets}):
        with torch.no_grad():
            full = model(ids, **arguments)
            assert tuple(full) == model.config.head_loops
            for exits in [(1,), (4,), (1, 4), [3], (1, 3, 4)]:
                found = model(ids, exits=exits, **arguments)
                assert sorted(found) == list(exits)
                for loop in exits:
                    torch.testing.assert_close(found[loop], full[loop], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sharing", "count"),
    [("separate", 143_516_928), ("shared_aux", 92_053_760), ("tied", 41_114_880)],
)
def test_parameter_counts_of_table_1(sharing, count):
    with torch.device("meta"):
        model = CRT(ModelConfig(head_sharing=sharing))
    assert sum(value.numel() for value in model.parameters()) == count


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


@pytest.mark.parametrize("length", [1, 2, 7, 13, 29, 61])
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("trm", VARIANTS)
def test_a_causal_model_does_not_see_later_tokens(trm, sharing, length):
    model = random_model(trm=trm, head_sharing=sharing)
    assert exits_that_see_later_tokens(model, length) == set()


@pytest.mark.parametrize(("causal", "leaking"), [(True, set()), (False, {1, 3, 4})])
def test_causality_across_the_tiles_of_a_fused_attention(causal, leaking):
    model = random_model(causal=causal, max_seq_len=1031)
    assert exits_that_see_later_tokens(model, 1031, [1, 127, 128, 512, 515, 1030]) == leaking


@pytest.mark.parametrize("length", [2, 7, 13, 29, 61])
@pytest.mark.parametrize("trm", VARIANTS)
def test_the_same_probe_finds_the_leak_of_symmetric_convolutions(trm, length):
    model = random_model(trm=trm, causal=False)
    leaking = set() if trm == "linear" else set(model.config.head_loops)
    assert exits_that_see_later_tokens(model, length) == leaking


@settings(max_examples=60)
@given(data=st.data())
def test_causality_holds_for_any_position_row_and_option(data):
    model = random_model(
        trm=data.draw(st.sampled_from(VARIANTS)),
        norm=data.draw(st.sampled_from(NORMS)),
        kernel_size=data.draw(st.sampled_from([1, 3, 5])),
        dilations=data.draw(st.sampled_from([(1,), (1, 2, 4), (5, 3)])),
        share_cycle_weights=data.draw(st.booleans()),
    )
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 64))
    row, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, length - 1))
    ids = random_ids(rows, length)
    changed = ids.clone()
    changed[row, j] = data.draw(st.integers(0, TINY.vocab_size - 1))
    others = torch.arange(rows) != row
    with torch.no_grad():
        before, after = model(ids), model(changed)
    for loop in model.config.head_loops:
        assert torch.equal(before[loop][:, :j], after[loop][:, :j])
        assert torch.equal(before[loop][others], after[loop][others])


BAD_CALLS = {
    "token too large": (torch.tensor([[1, 37]]), {}, "37"),
    "token negative": (torch.tensor([[1, -1]]), {}, "-1"),
    "too long": (torch.zeros(1, 65, dtype=torch.int64), {}, "65.*64"),
    "loop 0": (torch.tensor([[1]]), {"exits": (0,)}, "0"),
    "loop past the last": (torch.tensor([[1]]), {"exits": (1, 5)}, "5"),
    "negative loop": (torch.tensor([[1]]), {"exits": (-1,)}, "-1"),
    "loop without a head": (torch.tensor([[1]]), {"exits": (2,)}, "2"),
    "float ids": (torch.tensor([[1.0]]), {}, "float"),
    "one dimension": (torch.tensor([1, 2]), {}, "2"),
    "target too large": (torch.tensor([[1]]), {"targets": torch.tensor([[37]])}, "37"),
    "target negative": (torch.tensor([[1]]), {"targets": torch.tensor([[-5]])}, "-5"),
    "targets too many": (torch.tensor([[1]]), {"targets": torch.tensor([[1, 2]])}, "1, 2"),
    "targets transposed": (torch.tensor([[1], [2]]), {"targets": torch.tensor([[1, 2]])}, "1, 2"),
}


@pytest.mark.parametrize(("ids", "arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_clear_error(ids, arguments, message):
    with pytest.raises(InputError, match=message):
        random_model()(ids, **arguments)


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
