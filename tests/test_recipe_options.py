"""The options of a recipe: causality, initialisation, exits, optimizers and the fused loss."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_model import (
    ALL_OPTIONS,
    COMBINATIONS,
    OPTIONS,
    SHARINGS,
    TINY,
    VARIANTS,
    exits_that_see_later_tokens,
    random_ids,
    random_model,
)

from crt_lib import loss as loss_module
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.files import InputError
from crt_lib.layers import rotate
from crt_lib.loss import linear_cross_entropy
from crt_lib.model import CRT, count_parameters, total_loss
from crt_lib.schedule import exits_of_update, make_optimizers

CASES = OPTIONS | {"all": ALL_OPTIONS}
WIDE = ModelConfig(
    vocab_size=200,
    d_model=96,
    n_heads=4,
    n_loops=3,
    n_cycles=2,
    n_embed_cycles=1,
    max_seq_len=64,
    exit_loops=(1, 2),
    dropout=0.0,
)


@pytest.mark.parametrize("length", [2, 13, 29])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_causal_with_each_option(changes, length):
    assert exits_that_see_later_tokens(random_model(**changes), length) == set()


@pytest.mark.parametrize("changes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_causal_with_options_combined(changes):
    model = random_model(**{**changes, "causal": True})
    assert exits_that_see_later_tokens(model, 13) == set()


@pytest.mark.parametrize("length", [2, 13, 29])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_symmetric_convolutions_leak_with_each_option(changes, length):
    model = random_model(**{**changes, "causal": False})
    assert exits_that_see_later_tokens(model, length) == set(model.config.head_loops)


@given(half=st.integers(1, 16), length=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_rotated_products_depend_on_distance_only(half, length, seed):
    q, k = torch.randn(2, 2 * half, generator=torch.Generator().manual_seed(seed))
    turned_q, turned_k = rotate(q.expand(length, -1)), rotate(k.expand(length, -1))
    products = turned_q @ turned_k.T  # (T, T)
    tolerance = 2e-5 * (1 + q.norm().item() * k.norm().item())
    for distance in range(1 - length, length):
        along = products.diagonal(distance)
        assert (along - along[0]).abs().max() <= tolerance
    assert (products.diagonal() - q @ k).abs().max() <= tolerance
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(length))


def test_rotated_products_do_depend_on_distance():
    x = rotate(torch.ones(8, 4))
    assert (x[0] @ x.T).diff().abs().min() > 1e-3


def test_rotary_has_no_table_of_positions():
    learned, rotary = CRT(TINY), CRT(TINY.replace(positions="rotary"))
    missing = set(learned.state_dict()) - set(rotary.state_dict())
    assert missing == {"positions"}
    assert set(rotary.state_dict()) < set(learned.state_dict())


def test_swiglu_has_as_many_parameters_as_gelu():
    gelu, swiglu = CRT(WIDE), CRT(WIDE.replace(activation="swiglu"))
    for part in ("embed", "block"):
        counts = [count_parameters(getattr(model, part)) for model in (gelu, swiglu)]
        assert counts[1] == pytest.approx(counts[0], rel=0.01)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_an_embedding_as_wide_as_the_model_has_no_projections(sharing):
    names = set(CRT(WIDE.replace(embed_dim=96, head_sharing=sharing)).state_dict())
    assert not {name for name in names if name.startswith("embed.proj")}
    assert ({name for name in names if name.startswith("heads")} == set()) == (sharing == "tied")


SCALED = WIDE.replace(init="scaled", residual="pre", n_prelude=1, exit_norm=True)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("changes", [{}, {"n_prelude": 0}, {"activation": "swiglu"}], ids=str)
def test_scaled_initialisation(changes, sharing):
    config = SCALED.replace(**changes, head_sharing=sharing)
    torch.manual_seed(0)
    model = CRT(config)
    additions = (config.n_prelude + config.n_loops) * (1 + config.n_cycles)
    kinds = Counter()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif "depthwise" in name:
            assert (value[..., :-1] == 0).all() and (value[..., -1] == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "down.weight"))
            std = 0.02 / math.sqrt(additions) if residual else 0.02
            # within 6 standard errors of the deviation of so many normal numbers
            assert value.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * value.numel()))
            assert value.mean().abs().item() < 6 * std / math.sqrt(value.numel()), name
            kinds[residual] += 1
    blocks = 1 + config.n_prelude
    assert kinds[True] == blocks * (1 + config.n_cycles) + config.n_embed_cycles


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_scaled_convolutions_begin_as_the_identity(kernel_size, causal):
    model = CRT(
        SCALED.replace(
            pointwise=False, conv_after_norm=True, kernel_size=kernel_size, causal=causal
        )
    )
    x = torch.randn(2, 11, 96)
    for cycle in [*model.embed.cycles, *model.block.trm.cycles, *model.prelude[0].trm.cycles]:
        for dilation in (1, 4):
            assert torch.equal(cycle.conv(x, dilation), x)


def growth(factor: float = 1.0) -> float:
    """The stream's norm after 16 loops, as a multiple of its norm where it enters them.

    The block's matrices that add to the stream are multiplied by `factor` first.
    """
    torch.manual_seed(0)
    options = {"n_loops": 16, "exit_loops": (), "residual": "pre", "init": "scaled"}
    model = CRT(WIDE.replace(**options)).eval()
    entered = []
    model.dropout.register_forward_hook(lambda module, args, output: entered.append(output))
    with torch.no_grad():
        for name, value in model.block.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                value *= factor
        *_, (_, z) = model.hidden_states(random_ids(4, 32), 16)
    return (z.norm(dim=-1).mean() / entered[0].norm(dim=-1).mean()).item()


def test_depth_scaling_tames_the_growth_of_the_stream():
    undivided = math.sqrt(16 * (1 + WIDE.n_cycles))
    assert growth() < growth(undivided) / 5


def test_injection_begins_without_effect_but_learns():
    torch.manual_seed(0)
    injected = CRT(TINY.replace(injection=True, n_prelude=1)).train()
    plain = CRT(TINY.replace(n_prelude=1))
    weights = {k: v for k, v in injected.state_dict().items() if k != "injection"}
    plain.load_state_dict(weights)
    ids = random_ids(2, 13)
    with torch.no_grad():
        expected, found = plain(ids), injected(ids)
    for loop, logits in expected.items():
        assert torch.equal(found[loop], logits)
    sum(injected(ids, targets=random_ids(2, 13, seed=2)).values()).backward()
    assert (injected.injection.grad != 0).all()


LOOPS = (2, 4, 6, 8)
DRAWS = 3000


def drawn(head_loops: tuple[int, ...] = LOOPS, **changes) -> list[tuple[int, ...]]:
    """The exits of the first updates."""
    config = TrainConfig(**changes)
    return [exits_of_update(head_loops, update, config) for update in range(DRAWS)]


def assert_frequency(count: int, probability: float) -> None:
    """`count` of the draws is within 5 standard deviations of what `probability` has it."""
    deviation = math.sqrt(DRAWS * probability * (1 - probability))
    assert abs(count - DRAWS * probability) <= 5 * deviation


@pytest.mark.parametrize("sampling", ["none", "uniform", "poisson"])
@pytest.mark.parametrize("trained", ["all", "one"])
@pytest.mark.parametrize(
    "head_loops", [LOOPS, (1, 2, 3, 4, 5, 6, 7, 8), (3, 8), (1, 2), (4,), (1,)]
)
def test_exits_are_deterministic_and_increasing(head_loops, trained, sampling):
    options = {"loop_sampling": sampling, "exits_trained": trained}
    exits = drawn(head_loops, **options)
    assert exits == drawn(head_loops, **options)
    for loops in exits:
        assert loops and set(loops) <= set(head_loops)
        assert list(loops) == sorted(set(loops))
        if trained == "all":
            assert loops == head_loops[: len(loops)]
        elif len(loops) > 1:
            assert len(loops) == 2
        if sampling == "none":
            assert loops[-1] == head_loops[-1]


@pytest.mark.parametrize("options", [{"exits_trained": "one"}, {"loop_sampling": "uniform"}])
def test_another_seed_draws_other_exits(options):
    assert drawn(**options, seed=1) != drawn(**options, seed=2)


def test_all_exits_by_default():
    assert set(drawn()) == {LOOPS}


def test_one_exit_is_drawn_uniformly():
    counts = Counter(drawn(exits_trained="one"))
    assert set(counts) == {(2, 8), (4, 8), (6, 8)}
    for count in counts.values():
        assert_frequency(count, 1 / 3)


def test_one_exit_has_the_expectation_of_all():
    losses = {
        loop: torch.tensor(value) for loop, value in zip(LOOPS, (4.0, 2.5, 1.25, 1.0), strict=True)
    }
    every = {exits for exits in drawn(exits_trained="one")}
    totals = [total_loss({loop: losses[loop] for loop in exits}, 0.3) for exits in every]
    torch.testing.assert_close(torch.stack(totals).mean(), total_loss(losses, 0.3))


def test_uniform_depth_reaches_every_head_as_often_as_its_loops():
    head_loops = (1, 4, 6, 8)
    counts = Counter(exits[-1] for exits in drawn(head_loops, loop_sampling="uniform"))
    assert set(counts) == set(head_loops)
    for before, loop in itertools.pairwise((0, *head_loops)):
        assert_frequency(counts[loop], (loop - before) / 8)


def test_poisson_depth_is_mostly_the_deepest():
    counts = Counter(exits[-1] for exits in drawn(loop_sampling="poisson"))
    assert set(counts) == set(LOOPS)
    assert counts[8] > DRAWS / 2
    assert counts[8] > counts[6] > counts[4] > counts[2]


def test_one_exit_of_a_sampled_depth():
    exits = set(drawn(loop_sampling="uniform", exits_trained="one"))
    assert exits == {(2,), (2, 4), (2, 6), (4, 6), (2, 8), (4, 8), (6, 8)}


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
MUON_CASES = {
    **{trm: {"trm": trm} for trm in VARIANTS},
    **{sharing: {"head_sharing": sharing} for sharing in SHARINGS},
    "all options": ALL_OPTIONS,
    "narrow, batch norm": {"embed_dim": 6, "norm": "batch", "injection": True, "n_prelude": 2},
}


@needs_muon
@pytest.mark.parametrize("changes", MUON_CASES.values(), ids=MUON_CASES)
def test_muon_takes_the_matrices_inside_the_model(changes):
    model = CRT(TINY.replace(**changes))
    adamw, muon = make_optimizers(model, TrainConfig(optimizer="muon"))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    names = {id(value): name for name, value in model.named_parameters()}
    held = [
        [names[id(value)] for group in optimizer.param_groups for value in group["params"]]
        for optimizer in (adamw, muon)
    ]
    assert sorted(held[0] + held[1]) == sorted(names.values())
    matrices = ("qkv", "out", "up", "down", "pointwise", "proj")
    projections = {
        name
        for name, value in model.named_parameters()
        if name.startswith("heads.") and len(value) != TINY.vocab_size
    }
    assert set(held[1]) == projections | {
        name for name in names.values() if name.endswith(tuple(f".{m}.weight" for m in matrices))
    }


def test_adamw_takes_everything():
    model = CRT(TINY)
    (adamw,) = make_optimizers(model, TrainConfig())
    held = [id(value) for group in adamw.param_groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_a_step_moves_every_parameter(kind):
    model = random_model(**ALL_OPTIONS)
    before = {name: value.clone() for name, value in model.named_parameters()}
    sum(model(random_ids(2, 13), targets=random_ids(2, 13, seed=2)).values()).backward()
    for optimizer in make_optimizers(model, TrainConfig(optimizer=kind)):
        optimizer.step()
    for name, value in model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


def loss_and_gradients(features, weight, targets, fused: bool, scale: float = 0.7) -> list:
    """The mean loss and the gradients of `scale` times it, fused or by torch."""
    features, weight = (value.clone().requires_grad_() for value in (features, weight))
    if fused:
        loss = linear_cross_entropy(features, weight, targets)
        assert "FusedMean" in loss.grad_fn.name()
    else:
        logits = F.linear(features, weight).float().flatten(0, -2)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    return [loss, *torch.autograd.grad(scale * loss, (features, weight))]


def loss_case(shape: tuple[int, ...], vocabulary: int) -> tuple:
    """Features, vocabulary matrix, and targets of which a third is ignored."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(*shape, 12, generator=generator)
    weight = torch.randn(vocabulary, 12, generator=generator)
    targets = torch.randint(vocabulary, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.3
    ignored.view(-1)[0] = False
    return features, weight, targets.masked_fill(ignored, -100)


SHAPES = [((1,), 31), ((5,), 1), ((256,), 31), ((257,), 37), ((3, 100), 101), ((2, 307), 523)]


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(("shape", "vocabulary"), SHAPES)
def test_fused_loss_is_cross_entropy(shape, vocabulary, rows, monkeypatch):
    if rows:
        monkeypatch.setattr(loss_module, "FUSED_ROWS", rows)
    case = loss_case(shape, vocabulary)
    for found, wanted in zip(
        loss_and_gradients(*case, fused=True), loss_and_gradients(*case, fused=False), strict=True
    ):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half_features", [True, False])
@pytest.mark.parametrize(("shape", "vocabulary"), SHAPES)
def test_fused_loss_in_bfloat16_is_close(shape, vocabulary, half_features):
    features, weight, targets = loss_case(shape, vocabulary)
    exact = loss_and_gradients(features, weight, targets, fused=False)
    if half_features:
        features = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_and_gradients(features, weight, targets, fused=True)
    assert [value.dtype for value in half] == [torch.float32, features.dtype, torch.float32]
    assert half[0].item() == pytest.approx(exact[0].item(), rel=0.01, abs=1e-6)
    for found, wanted in zip(half[1:], exact[1:], strict=True):
        assert (found.float() - wanted).norm() <= 0.02 * wanted.norm() + 1e-6


def test_fused_loss_of_large_logits_is_finite():
    features, weight, targets = loss_case((300,), 37)
    case = (1e3 * features, weight, targets)
    for found, wanted in zip(
        loss_and_gradients(*case, fused=True), loss_and_gradients(*case, fused=False), strict=True
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_fused_loss_gives_ignored_positions_no_gradient():
    features, weight, targets = loss_case((300,), 37)
    _, by_features, _ = loss_and_gradients(features, weight, targets, fused=True)
    assert (by_features[targets == -100] == 0).all()
    assert (by_features[targets != -100] != 0).any(-1).all()


def test_fused_loss_of_nothing_scored_is_as_torchs():
    features, weight, targets = loss_case((5,), 31)
    nothing = torch.full_like(targets, -100)
    assert loss_and_gradients(features, weight, nothing, fused=False)[0].isnan()
    assert loss_and_gradients(features, weight, nothing, fused=True)[0].isnan()


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
