"""The share of the device that a training used, and a limit on a GPU's memory."""

import pytest
import torch

from crt_lib import InputError, load_profile
from crt_lib.accounting import multiply_adds
from crt_lib.device import limit_memory, matmul_peak, utilisation


def test_utilisation_by_hand():
    profile = load_profile("small", "paper")
    config, train = profile.model.replace(vocab_size=100), profile.train
    positions = train.batch_size * train.seq_len
    flops = 6 * sum(multiply_adds(config, train.seq_len).values()) * positions
    assert utilisation(config, train, [9.0, 11.0, 13.0], peak=flops) == pytest.approx(1 / 2)
    one = train.replace(exits_trained="one")
    heads = 6 * 3 * (config.embedding_width * (config.d_model + 100)) * positions
    assert utilisation(config, one, [2.0], peak=flops - heads) == pytest.approx(1 / 2)


def test_a_peak_is_measured():
    assert matmul_peak(torch.device("cpu"), torch.float32, 64) > 1e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_no_limit_without_a_gpu():
    with pytest.raises(InputError, match="needs a GPU"):
        limit_memory(6)
