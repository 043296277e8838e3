"""`crt bench decode`: every way is there, and the GPT-2 beside it decodes what GPT-2 says."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from tiny_models import ALL_OPTIONS, OPTIONS, random_model
from torch._inductor.exc import InvalidCxxCompiler

from crt_lib import InputError, load_profile
from crt_lib.audit.accounting import cycle_multiply_adds, multiply_adds
from crt_lib.bench import gpt2 as gpt2_module
from crt_lib.bench.bound import Reading
from crt_lib.bench.decode import READINGS, bench_decode, measured_pace
from crt_lib.bench.gpt2 import cost_of_a_token, gpt2_generate, matched, name_of, parameters
from crt_lib.bench.ways import FEWEST, INT8, UNCACHED, generate_as_released, ratio
from crt_lib.config import GPT2Config, make_model
from crt_lib.exits.decode import generate
from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.exits.trace import apply_policy, calibrate, make_trace

SEQ_LEN = 32
TOKEN = partial(cost_of_a_token, seq_len=1)


@pytest.fixture
def bench(scored):
    model, data, valid = scored
    trace = make_trace(model, data, "test", SEQ_LEN, max_tokens=300)
    exits = {f"exit {loop}": Policy(fixed=loop) for loop in model.config.exit_loops}
    policies = {"full depth": Policy(), **exits, "the paper's thresholds": Policy("confidence")}
    policies |= {name: calibrate(valid, name, 0.005) for name in CRITERIA}
    losses = {name: 1.0 + i for i, name in enumerate(policies)}
    prompts = [data.valid.ids[i * SEQ_LEN :][:4].tolist() for i in range(2)]

    def run(count=1, model=model, **how):
        how = {"new_tokens": 6, "compiled": False} | how
        return bench_decode(model, prompts[:count], policies, losses, trace, **how)

    run.model, run.policies, run.losses, run.trace = model, policies, losses, trace
    return run


def names_beside(model):
    """The GPT-2s beside a model: of its multiply-adds, and of its parameters."""
    c = model.config
    shape = {"d_model": c.d_model, "n_heads": c.n_heads, "max_seq_len": c.max_seq_len}
    like = GPT2Config(vocab_size=c.vocab_size, **shape)
    return [name_of(matched(like, c, cost)) for cost in (TOKEN, parameters)]


def test_rows_of_every_way(bench):
    model, policies = bench.model, bench.policies
    one = {row["way"]: row for row in bench()}
    drafts = [f"speculation from {who}" for who in ("the text", *model.config.exit_loops)]
    gpt2s = set(names_beside(model))
    asked = {"full depth, similarity asked", "full depth, gate asked"}
    # int8 is of float32
    assert set(one) == {*UNCACHED, *policies, *drafts, *asked, *gpt2s, *READINGS}
    assert one["full depth"]["speedup"] == 1 and one["exit 2"]["decoded_loops"] == 2
    for row in one.values():
        assert row["tokens_per_second"] > 0 and row["batches"] == 1
        assert row["isa"] and row["threads"] and row["precision"] == "float64"
        if row["way"] not in READINGS:
            assert 0 < row["ms_p5"] <= row["ms"] <= row["ms_p95"] and row["first_ms"] > 0
        if row["way"] not in UNCACHED and row["threads"] > 1:
            assert row["tokens_per_second_1"] > 0
    assert 0 <= one[drafts[0]]["accepted"] <= 1 and one["full depth"]["accepted"] is None
    for name in policies:
        assert one[name]["token_ppl"] == math.exp(bench.losses[name])
        assert one[name]["mean_loops"] == apply_policy(bench.trace, policies[name]).mean_loops
        assert one[name]["bound_share"] > 0
    for name in asked:
        row = one[name]
        assert row["decoded_loops"] == model.config.n_loops and row["decoded_heads"] == 1
        assert row["decoded_asks"] == len(model.config.exit_loops)
    pace = measured_pace(list(one.values()))  # of six tokens, which says nothing of the speed
    assert math.isfinite(pace.tokens_per_second(apply_policy(bench.trace, Policy())))

    two = bench(2, batch_size=2, uncached=False)
    assert {row["way"] for row in two} == {*policies, *asked, *gpt2s, *READINGS}
    assert two[0]["bound_share"] > 0
    assert not any(row.get("low") for row in two)  # of one batch there is no interval
    with pytest.raises(InputError, match="1 prompts are not whole batches of 2"):
        bench(1, batch_size=2)


def test_every_batch_is_written_by_every_way_but_the_slow_ones(bench):
    rows = {row["way"]: row for row in bench(2, only=["exit", "no cache"])}
    assert {row["batches"] for way, row in rows.items() if way not in UNCACHED} == {2}
    assert all(rows[way]["batches"] == 1 and "low" not in rows[way] for way in UNCACHED)
    assert rows["full depth"]["speedup"] == 1 and "low" not in rows["full depth"]  # of two batches


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=20))
def test_a_ratio_of_sums_lies_between_the_pairs_ratios(pairs):
    over, under = np.array(pairs).T
    found, each = ratio(over, under), over / under
    assert len(found) == (3 if len(pairs) >= FEWEST else 1)
    assert found[0] == pytest.approx(over.sum() / under.sum())
    assert all(each.min() - 1e-9 <= one <= each.max() + 1e-9 for one in found)


def test_the_interval_holds_the_ratio_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        under = rng.lognormal(0, 0.2, 64)
        low, high = ratio(1.5 * under * rng.lognormal(0, 0.1, 64), under)[1:]
        held += low <= 1.5 * np.exp(0.1**2 / 2) <= high
    assert 180 <= held <= 199


def test_only_some_ways(bench):
    threads = torch.get_num_threads()
    single = copy.deepcopy(bench.model).float()
    ways = [row["way"] for row in bench(model=single, only=["exit", "int8"])]
    exits = [f"exit {loop}" for loop in bench.model.config.exit_loops]
    assert ways == ["full depth", *exits, INT8, *READINGS]
    assert torch.get_num_threads() == threads
    with pytest.raises(InputError, match="no way of decoding has 'nothing' in its name"):
        bench(only=["nothing"])


def test_what_cannot_be_compiled_is_left_out(bench, monkeypatch, capsys):
    def fails(*given):
        raise InvalidCxxCompiler()

    monkeypatch.setattr(torch, "compile", lambda *given, **how: fails)
    ways = [row["way"] for row in bench(only=["GPT-2"], compiled=True)]
    assert not any("compiled" in way for way in ways) and len(ways) == 2 + len(READINGS) + 1
    said = capsys.readouterr().out
    assert "is left out: torch.compile: No working C++ compiler" in said


@pytest.mark.parametrize("changes", [{}, ALL_OPTIONS, *OPTIONS.values()])
def test_the_bound_multiplies_with_every_matrix(changes):
    """Its products are the model's multiply-adds, attention over positions and taps apart.

    The vocabulary is counted once.
    """
    model = random_model(**{**changes, "causal": True})
    config = model.config
    reading = Reading(model, 2, 5)
    size = [
        sum(x.shape[1] * product(x).shape[1] for product, x in products)
        for products in (reading.embedding, reading.block, reading.head)
    ]
    made = size[0] + config.n_loops * size[1] + size[2]
    counted = multiply_adds(config, 0, (config.n_loops,))
    blocks = config.n_prelude + config.n_loops
    cycles = config.n_embed_cycles + blocks * config.n_cycles
    taps = cycles * cycle_multiply_adds(config)["depthwise"]
    assert made == sum(counted.values()) - taps, (size, counted)
    assert len(reading.kept) == 2 * config.n_loops  # keys, and values
    assert reading().shape == (4,) and (reading() > 0).all()


def test_the_slow_way_makes_the_same_text(scored):
    model, *_ = scored
    prompts = [[3, 1, 4], [1, 5, 9]]
    slow = generate_as_released(model, prompts, 6)
    assert slow.tolist() == [one.tokens for one in generate(model, prompts, 6)]


def test_the_gpt2_has_about_the_multiply_adds(scored):
    model, *_ = scored
    gpt2 = matched(GPT2Config(vocab_size=270, d_model=32, n_heads=2), model.config, TOKEN)
    ours, theirs = cost_of_a_token(model.config, 1), cost_of_a_token(gpt2, 1)
    layer = cost_of_a_token(gpt2.replace(n_layers=gpt2.n_layers + 1), 1) - theirs
    assert abs(ours - theirs) <= layer / 2 or gpt2.n_layers == 1


def test_the_other_gpt2_has_about_the_parameters():
    like = GPT2Config(vocab_size=8192, d_model=256, n_heads=4)
    ours = load_profile("small").model.replace(vocab_size=8192)
    gpt2 = matched(like, ours, parameters)
    layer = parameters(gpt2.replace(n_layers=gpt2.n_layers + 1)) - parameters(gpt2)
    assert abs(parameters(ours) - parameters(gpt2)) <= layer / 2
    assert name_of(gpt2) == "GPT-2 256 x 2"


def test_gpt2_with_a_cache_says_what_it_says_without():
    torch.manual_seed(0)
    model = make_model(GPT2Config(vocab_size=50, d_model=16, n_heads=2, n_layers=2, max_seq_len=32))
    model.eval().double()
    eager = gpt2_module._step  # what is compiled is torch's affair
    prompts, each = [[3, 1, 4], [1, 5, 9]], []
    with torch.inference_mode():
        made = gpt2_generate(model, None, prompts, 8, each=each.append)
        ids = torch.tensor(prompts)
        for _ in range(8):
            (logits,) = model(ids).values()
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert (
            gpt2_generate(model, eager, prompts, 8, each=each.append).tolist()
            == ids[:, 3:].tolist()
        )
    assert made.tolist() == ids[:, 3:].tolist()
    assert len(each) == 16 and [list(row) for row in zip(*each[:8], strict=True)] == made.tolist()
