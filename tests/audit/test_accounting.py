"""Parameters and multiply-adds counted by hand, against torch's own counts."""

import pytest
import torch
from tiny_models import count_parameters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crt_lib.audit.accounting import cycle_multiply_adds, multiply_adds, parameters_by_part
from crt_lib.config import GPT2Config, ModelConfig, make_model

TINY = ModelConfig(
    vocab_size=53, d_model=24, n_heads=3, n_loops=4, n_cycles=3, exit_loops=(1, 3), max_seq_len=40
)
SHARINGS = ("separate", "shared_aux", "tied")
VARIANTS = ("depthwise_mlp", "linear", "conv", "conv_linear", "depthwise")
CASES = [{"head_sharing": sharing, "trm": trm} for sharing in SHARINGS for trm in VARIANTS]
CASES += [
    {"residual": "pre", "exit_norm": True, "init": "scaled", "injection": True},
    {"pointwise": False, "conv_after_norm": True, "embed_dim": 24, "head_sharing": "tied"},
    {"activation": "swiglu", "positions": "rotary", "n_prelude": 2, "head_sharing": "tied"},
]


def by_torch(model, exits=None):
    # the fused CPU kernel of attention is not among those that torch counts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(53, (1, 16)), exits=exits)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_counts_agree_with_torch(changes):
    config = TINY.replace(**changes)
    model = make_model(config).eval()
    assert sum(parameters_by_part(config).values()) == count_parameters(model)
    for exits in (config.head_loops, (3,)):
        # torch's counter does not see the depthwise taps, which are multiplications of tensors
        cycles = (config.n_prelude + max(exits)) * config.n_cycles + config.n_embed_cycles
        taps = cycles * cycle_multiply_adds(config)["depthwise"]
        counted = sum(multiply_adds(config, 16, exits).values()) - taps
        assert by_torch(model, exits) == 16 * counted


def test_gpt2_counts_agree_with_torch():
    config = GPT2Config(vocab_size=53, d_model=24, n_heads=3, n_layers=2, max_seq_len=40)
    model = make_model(config).eval()
    assert sum(parameters_by_part(config).values()) == count_parameters(model)
    assert by_torch(model) == 16 * sum(multiply_adds(config, 16).values())


def test_the_paper_model():
    by_part = multiply_adds(ModelConfig(), 384)
    one_loop = (by_part["attention"] + by_part["block TRM"]) / 8
    assert one_loop == pytest.approx(20.0e6, rel=0.03)  # a whole loop, projections and cycles
    assert by_part["heads"] / 4 == pytest.approx(25.7e6, rel=0.01)  # one vocabulary head
