"""The precision that a device is fast at, the share of it that a training used, its limit."""

import math

import pytest
import torch

from crt_lib import InputError, device, load_profile
from crt_lib.audit.accounting import multiply_adds
from crt_lib.device import WIDE, choose_precision
from crt_lib.runs.machine import limit_memory, matmul_peak, utilisation


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
    assert 0 < matmul_peak(torch.device("cpu"), torch.float32, 64) < math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_no_limit_without_a_gpu():
    with pytest.raises(InputError, match="needs a GPU"):
        limit_memory(6)


CPU = torch.device("cpu")


@pytest.mark.parametrize("speed, fast", [(4.5, "bf16"), (0.01, "fp32"), (1.0, "fp32")])
def test_auto_follows_what_was_measured(monkeypatch, speed, fast):
    monkeypatch.setattr(device, "bf16_speed", lambda kind: speed)
    name, why = choose_precision("auto", CPU, 512)
    assert name == fast and f"{speed:.2g} times" in why
    assert choose_precision("auto", CPU, int(WIDE / speed) - 1).name == "fp32"
    name, why = choose_precision("bf16", CPU, 32)
    assert name == "bf16" and why.startswith("asked for") and f"{speed:.2g} times" in why
    assert choose_precision("fp32", CPU, 512) == ("fp32", "asked for")


def test_the_speed_of_bf16_is_measured_once():
    assert 0 < device.bf16_speed("cpu") == device.bf16_speed("cpu")


@pytest.mark.parametrize("optimizer, said", [("muon", "one optimizer"), ("adamw", "needs a GPU")])
def test_fp16_where_it_cannot_be(optimizer, said):
    with pytest.raises(InputError, match=said):
        choose_precision("fp16", CPU, 512, optimizer)
