"""Parameters and multiply-adds counted by hand, against torch's own counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crt_lib.audit.accounting import count_parameters, multiply_adds, parameters_by_part
from crt_lib.config import GPT2Config, ModelConfig, make_model
from crt_lib.model import CRT

TINY = ModelConfig(
    vocab_size=53, d_model=24, n_heads=3, n_loops=4, n_cycles=3, exit_loops=(1, 3), max_seq_len=40
)


@pytest.mark.parametrize("sharing", ["separate", "shared_aux", "tied"])
@pytest.mark.parametrize("trm", ["depthwise_mlp", "linear", "conv", "conv_linear", "depthwise"])
def test_counts_agree_with_torch(sharing, trm):
    config = TINY.replace(head_sharing=sharing, trm=trm)
    model = CRT(config).eval()
    assert sum(parameters_by_part(config).values()) == count_parameters(model)

    for exits in (config.head_loops, (3,)):
        # the fused CPU kernel of attention is not among those that torch counts
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randint(53, (1, 16)), exits=exits)
        by_hand = sum(multiply_adds(config, 16, exits).values()) * 16
        # torch's counter does not see the depthwise taps, which are multiplications of tensors
        taps = 0
        if trm.startswith("depthwise"):
            taps = 16 * 3 * 24 * (max(exits) * config.n_cycles + config.n_embed_cycles)
        assert counter.get_total_flops() == 2 * (by_hand - taps)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "pre", "exit_norm": True, "init": "scaled", "injection": True},
        {"pointwise": False, "conv_after_norm": True, "embed_dim": 24},
        {"activation": "swiglu", "positions": "rotary", "n_prelude": 2, "embed_dim": 10},
    ],
)
def test_counts_of_the_other_options_agree_with_torch(changes):
    config = TINY.replace(head_sharing="tied", n_heads=3, **changes)
    model = CRT(config).eval()
    assert sum(parameters_by_part(config).values()) == count_parameters(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(53, (1, 16)))
    taps = 16 * 3 * 24 * ((config.n_prelude + 4) * config.n_cycles + config.n_embed_cycles)
    by_hand = sum(multiply_adds(config, 16).values()) * 16
    assert counter.get_total_flops() == 2 * (by_hand - taps)


def test_gpt2_counts_agree_with_torch():
    config = GPT2Config(vocab_size=53, d_model=24, n_heads=3, n_layers=2, max_seq_len=40)
    model = make_model(config).eval()
    assert sum(parameters_by_part(config).values()) == count_parameters(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(53, (1, 16)))
    assert counter.get_total_flops() == 2 * 16 * sum(multiply_adds(config, 16).values())


def test_the_paper_model():
    by_part = multiply_adds(ModelConfig(), 384)
    one_loop = (by_part["attention"] + by_part["block TRM"]) / 8
    assert one_loop == pytest.approx(20.0e6, rel=0.03)  # a whole loop, projections and cycles
    assert by_part["heads"] / 4 == pytest.approx(25.7e6, rel=0.01)  # one vocabulary head
