"""`crt bench decode`: every way is there, and the GPT-2 beside it decodes what GPT-2 says."""

import math

import pytest
import torch

from crt_lib import InputError
from crt_lib.baselines import make_model
from crt_lib.benchdecode import (
    bench_decode,
    first_prompts,
    generate_as_released,
    gpt2_generate,
    matched_gpt2,
    measured_pace,
)
from crt_lib.config import GPT2Config
from crt_lib.decode import generate
from crt_lib.exits import CRITERIA, Policy
from crt_lib.model import count_parameters
from crt_lib.trace import apply_policy, calibrate, make_trace

SEQ_LEN = 32


def test_rows_of_every_way(scored):
    model, data, valid = scored
    trace = make_trace(model, data, "test", SEQ_LEN, max_tokens=300)
    exits = {f"exit {loop}": Policy(fixed=loop) for loop in model.config.exit_loops}
    policies = {"full depth": Policy(), **exits, "the paper's thresholds": Policy("confidence")}
    policies |= {name: calibrate(valid, name, 0.005) for name in CRITERIA}
    losses = {name: 1.0 + i for i, name in enumerate(policies)}
    sizes = {"policies": policies, "losses": losses, "test": trace, "new_tokens": 6, "repeats": 1}
    prompts = first_prompts(data, SEQ_LEN, 2, 4)
    one = {row["way"]: row for row in bench_decode(model, prompts[:1], **sizes)}
    drafts = [f"speculation from {loop}" for loop in model.config.exit_loops]
    (gpt2,) = (way for way in one if way.startswith("GPT-2"))
    uncached = {"no cache, every head", "no cache"}
    assert set(one) == {*uncached, *policies, *drafts, gpt2}
    assert one["full depth"]["speedup"] == 1 and one["exit 2"]["decoded_loops"] == 2
    assert all(row["tokens_per_second"] > 0 for row in one.values())
    assert 0 <= one[drafts[0]]["accepted"] <= 1 and one["full depth"]["accepted"] is None
    for name in policies:
        assert one[name]["token_ppl"] == math.exp(losses[name])
        assert one[name]["mean_loops"] == apply_policy(trace, policies[name]).mean_loops
    pace = measured_pace(list(one.values()))  # of six tokens, which says nothing of the speed
    assert math.isfinite(pace.tokens_per_second(apply_policy(trace, Policy())))

    two = bench_decode(model, prompts, batch_size=2, uncached=False, **sizes)
    assert {row["way"] for row in two} == {*policies, gpt2}
    with pytest.raises(InputError, match="1 prompts are not whole batches of 2"):
        bench_decode(model, prompts[:1], batch_size=2, **sizes)


def test_the_slow_way_makes_the_same_text(scored):
    model, *_ = scored
    prompts = [[3, 1, 4], [1, 5, 9]]
    slow = generate_as_released(model, prompts, 6)
    assert slow.tolist() == [one.tokens for one in generate(model, prompts, 6)]


def test_the_gpt2_has_about_the_parameters(scored):
    model, *_ = scored
    gpt2 = matched_gpt2(model)
    ours, theirs = count_parameters(model), count_parameters(gpt2)
    layer = sum(p.numel() for p in gpt2.transformer.h[0].parameters())
    assert abs(ours - theirs) <= layer / 2 or gpt2.config.n_layers == 1


def test_gpt2_with_a_cache_says_what_it_says_without():
    torch.manual_seed(0)
    model = make_model(GPT2Config(vocab_size=50, d_model=16, n_heads=2, n_layers=2, max_seq_len=32))
    model.eval().double()
    with torch.inference_mode():
        made = gpt2_generate(model, [[3, 1, 4], [1, 5, 9]], 8)
        ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
        for _ in range(8):
            (logits,) = model(ids).values()
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert made.tolist() == ids[:, 3:].tolist()
