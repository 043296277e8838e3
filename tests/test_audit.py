"""The causality probe: it clears what is causal and finds what is not."""

import pytest
import torch
from torch import nn

from crt_lib import CRT, causality_report, load_profile

CONFIG = load_profile("smoke", "paper").model.replace(vocab_size=31)


def report(**changes):
    torch.manual_seed(0)
    return causality_report(CRT(CONFIG.replace(**changes)), 31, length=17)


def test_the_causal_model_is_clear_at_every_exit():
    clear = report()
    assert not clear.leaks
    assert clear.first_leaking_offset is clear.furthest_leaking_offset is None
    assert set(clear.changes) == {1, 2, 3, 4}
    assert "verdict: causal" in str(clear)
    for matrix in clear.changes.values():
        assert (matrix.diagonal() > 0).all(), "a token that moves nothing: the probe is blind"


def test_the_symmetric_model_is_convicted():
    leaking = report(causal=False)
    assert leaking.leaks
    assert leaking.first_leaking_offset == 1
    assert "verdict: sees the future" in str(leaking)


def test_how_far_one_symmetric_cycle_looks_ahead():
    """Dilation 4, once: 4 tokens ahead, and through attention there the 3 before them too."""
    leaking = report(
        causal=False, n_loops=1, exit_loops=(), n_cycles=1, n_embed_cycles=0, dilations=(4,)
    )
    assert (leaking.first_leaking_offset, leaking.furthest_leaking_offset) == (1, 4)


class LooksAhead(nn.Module):
    """Any model from ids to logits can be probed; this one reads its labels."""

    def forward(self, ids):
        return nn.functional.one_hot(ids.roll(-1, 1), 31).float()


def test_models_of_others():
    assert causality_report(LooksAhead(), 31).first_leaking_offset == 1

    class Noise(nn.Module):
        def forward(self, ids):
            return torch.randn(*ids.shape, 31)

    with pytest.raises(ValueError, match="random"):
        causality_report(Noise(), 31)


def test_training_mode_is_left_as_it_was():
    model = CRT(CONFIG).train()
    causality_report(model, 31, length=4)
    assert model.training
