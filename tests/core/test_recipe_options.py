"""The options of a recipe: rotary positions, initialisation, injection."""

import math
from collections import Counter

import pytest
import torch
from closeness import EXACT, same
from hypothesis import given, strategies as st
from tiny_models import SHARINGS, TINY, count_parameters, random_ids

from crt_lib.kernels import rotate, turns
from crt_lib.model import CRT

WIDE = TINY.replace(vocab_size=200, d_model=96, n_heads=4, n_loops=3, exit_loops=(1, 2))
WIDE = WIDE.replace(n_cycles=2, n_embed_cycles=1)


@given(half=st.integers(1, 16), length=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_rotated_products_depend_on_distance_only(half, length, seed):
    q, k = torch.randn(2, 2 * half, generator=torch.Generator().manual_seed(seed)).double()
    by = turns(torch.arange(length), torch.float64, 2 * half)
    turned_q, turned_k = rotate(q.expand(length, -1), *by), rotate(k.expand(length, -1), *by)
    products = turned_q @ turned_k.T  # (T, T)
    tolerance = EXACT * (1 + q.norm().item() * k.norm().item())
    for distance in range(1 - length, length):
        along = products.diagonal(distance)
        assert (along - along[0]).abs().max() <= tolerance
    assert (products.diagonal() - q @ k).abs().max() <= tolerance
    same(turned_q.norm(dim=-1), q.norm().expand(length))


def test_rotated_products_do_depend_on_distance():
    x = rotate(torch.ones(8, 4), *turns(torch.arange(8), torch.float32, 4))
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
    changes = {"pointwise": False, "conv_after_norm": True, "causal": causal}
    model = CRT(SCALED.replace(**changes, kernel_size=kernel_size))
    x = torch.randn(2, 11, 96)
    for cycle in [*model.embed.cycles, *model.block.trm.cycles, *model.prelude[0].trm.cycles]:
        for dilation in (1, 4):
            assert torch.equal(cycle.conv(x, dilation), x)


def test_noise_is_added_to_kernels_that_begin_as_the_identity():
    config = SCALED.replace(conv_noise=0.6)
    kernels = [v for name, v in CRT(config).named_parameters() if "depthwise" in name]
    noise = torch.cat([value.flatten(0, 1) for value in kernels])
    noise[:, -1] -= 1
    # within 6 standard errors of the deviation of so many normal numbers
    assert noise.std().item() == pytest.approx(0.6, rel=6 / math.sqrt(2 * noise.numel()))
    assert noise.mean().abs().item() < 6 * 0.6 / math.sqrt(noise.numel())


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
    injected = CRT(TINY.replace(injection=True, n_prelude=1)).train().double()
    plain = CRT(TINY.replace(n_prelude=1)).double()
    weights = {k: v for k, v in injected.state_dict().items() if k != "injection"}
    plain.load_state_dict(weights)
    ids = random_ids(2, 13)
    with torch.no_grad():
        expected, found = plain(ids), injected(ids)
    same(found, expected)
    sum(injected(ids, targets=random_ids(2, 13, seed=2)).values()).backward()
    assert (injected.injection.grad != 0).all()
