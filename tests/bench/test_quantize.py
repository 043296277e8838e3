"""Weights in 8 bits: what decoding says with them, what it loses, and where they are refused."""

import copy
import math

import pytest
from tiny_models import ALL_OPTIONS, random_ids, random_model

from crt_lib import InputError, evaluate
from crt_lib.bench.quantize import bench_quantize
from crt_lib.cached.memory import Memory
from crt_lib.cached.products import FinelyQuantized, Quantized
from crt_lib.cached.step import Step
from crt_lib.exits.decode import generate
from crt_lib.exits.policy import Policy, leave

SEQ_LEN = 32


@pytest.fixture
def all_in_8_bits(monkeypatch):
    monkeypatch.setattr("crt_lib.cached.products.LARGE", 0)
    monkeypatch.setattr("crt_lib.cached.products.LARGE_FOR_ROWS", 0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_in_8_bits(rows, all_in_8_bits):
    """Near the step in float32: a weight and an input are off by a hundredth or so at most."""
    model, ids = random_model(**ALL_OPTIONS), random_ids(rows, 9)
    logits = []
    for quantize in (None, "int8"):
        step = Step(model, Memory(model.config, rows, 9, model.loop_encoding), quantize)
        for at in range(9):
            exited = leave(step, ids[:, at], Policy())
        logits.append(exited.logits)
    kinds = [type(product) for _, _, product in step.heads.values()]
    assert set(kinds) == {FinelyQuantized} and isinstance(step.block.qkv, Quantized)
    plain, rounded = logits
    off = (rounded - plain).norm() / plain.norm()
    assert 0 < off < 0.1


def test_what_8_bits_lose(scored, all_in_8_bits):
    """In float32 a position at a time gives the loss of whole windows; in 8 bits nearly that."""
    model, data, _ = scored
    model = copy.deepcopy(model).float()
    rows = bench_quantize(model, data, SEQ_LEN, rows=4, max_tokens=500)
    eot = data.tokenizer.eot_id
    whole = evaluate(model, data.test, eot, seq_len=SEQ_LEN, max_tokens=500).loss
    assert [row["exit"] for row in rows] == list(model.config.head_loops)
    for row in rows:
        assert row["loss"] == pytest.approx(whole[row["exit"]], rel=1e-4)
        lost = (row["quantized_loss"] - row["loss"]) * len(data.test.ids) / data.test.n_words
        assert row["word_ppl_ratio"] == pytest.approx(math.exp(lost), rel=1e-6)
        assert row["low"] <= row["word_ppl_ratio"] <= row["high"]
        assert row["quantized_loss"] != row["loss"] and abs(lost) < 0.1
        assert row["quantized_weight_mb"] < row["weight_mb"] / 2


@pytest.mark.parametrize(
    ("dtype", "how", "said"),
    [
        ("float", {"quantize": "int4"}, "quantize is 'int4'; it must be one of int8"),
        ("float", {"quantize": "int8", "cache": False}, "leave cache on"),
        ("bfloat16", {"quantize": "int8"}, "needs float32 weights on a CPU; these are bfloat16"),
    ],
)
def test_what_cannot_be_in_8_bits(dtype, how, said):
    model = getattr(random_model(), dtype)()
    with pytest.raises(InputError, match=said):
        generate(model, [[3, 1, 4]], 2, **how)
