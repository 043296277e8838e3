"""The precision that a device is fast at."""

import pytest
import torch

from crt_lib import InputError, device
from crt_lib.device import WIDE, choose_precision

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


def test_compiling_without_a_compiler(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nonexistent/c++"))
    device.check_compiler(torch.device("meta"))  # only a CPU's code needs one
    with pytest.raises(InputError, match=r"train\.compile needs a C\+\+ compiler"):
        device.check_compiler(CPU)
