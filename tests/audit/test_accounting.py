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


CONFIGS = [TINY.replace(**changes) for changes in CASES]
CONFIGS += [GPT2Config(vocab_size=53, d_model=24, n_heads=3, n_layers=3, max_seq_len=40)]


@pytest.mark.parametrize("config", CONFIGS, ids=[*map(str, CASES), "GPT-2"])
def test_counts_agree_with_torch(config):
    model, taps = make_model(config).eval(), 0
    assert sum(parameters_by_part(config).values()) == count_parameters(model)
    for exits in {config.head_loops, (3,)}:
        if isinstance(config, ModelConfig):
            # torch's counter does not see the depthwise taps, which are multiplications of tensors
            cycles = (config.n_prelude + max(exits)) * config.n_cycles + config.n_embed_cycles
            taps = cycles * cycle_multiply_adds(config)["depthwise"]
        # the fused CPU kernel of attention is not among those that torch counts
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randint(53, (1, 16)), exits=exits)
        counted = sum(multiply_adds(config, 16, exits).values()) - taps
        assert counter.get_total_flops() == 2 * 16 * counted


def test_the_paper_model():
    by_part = multiply_adds(ModelConfig(), 384)
    one_loop = (by_part["attention"] + by_part["block TRM"]) / 8
    assert one_loop == pytest.approx(20.0e6, rel=0.03)  # a whole loop, projections and cycles
    assert by_part["heads"] / 4 == pytest.approx(25.7e6, rel=0.01)  # one vocabulary head
