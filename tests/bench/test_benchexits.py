"""`crt bench exits`: what is timed is what is scored, and mixes and the oracle leave where told."""

import numpy as np
import pytest
import torch
from tiny_models import OPTIONS, random_model

from crt_lib import InputError
from crt_lib.bench.exits import MIX, ORACLE, bench_exits
from crt_lib.bench.reading import Reader, Told, first_as_good, mixed
from crt_lib.bench.ways import FEWEST
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.exits.scoring import evaluate_with_exits

SEQ_LEN = 16
POLICIES = {
    "full depth": Policy(),
    "exit 1": Policy(fixed=1),
    "similarity": Policy("similarity", 0.9, 0.9, 1.0),
    "confidence": Policy("confidence", 0.05, 0.05, 1.0),
    "again": Policy(),
}


def texts(model, rows=3):
    ids = torch.randint(model.config.vocab_size, (rows, SEQ_LEN + 1))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_step_scores_what_a_window_scores(option, policy):
    model = random_model(**OPTIONS[option]).eval()
    if 1 not in model.config.head_loops:
        policy = Policy()
    inputs, targets = texts(model)
    found = Reader(model, len(inputs), SEQ_LEN).read(inputs, targets, policy)
    whole = run_with_exits(model, inputs, policy)
    nats = -whole.logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    np.testing.assert_allclose(found.nats, nats, atol=2e-4)
    np.testing.assert_array_equal(found.loops, whole.loops)
    assert found.seconds.shape == (SEQ_LEN,) and (found.seconds > 0).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_leave_where_they_are_told(rows):
    model = random_model().eval()
    inputs, targets = texts(model, rows)
    exits = model.config.head_loops
    told = Told(loops=torch.tensor(exits)[torch.randint(len(exits), inputs.shape)])
    reader = Reader(model, rows, SEQ_LEN)
    np.testing.assert_array_equal(reader.read(inputs, targets, told).loops, told.loops)
    full = reader.read(inputs, targets, Policy())
    told = Told(loops=torch.full(inputs.shape, exits[-1]))
    np.testing.assert_array_equal(reader.read(inputs, targets, told).nats, full.nats)


def test_the_oracle_is_the_first_exit_that_is_no_worse():
    model = random_model().eval()
    inputs, targets = texts(model)
    losses = {k: v.detach() for k, v in model(inputs, targets=targets, reduction="none").items()}
    last = losses[model.config.n_loops]
    chosen = first_as_good(model, inputs, targets)
    for k, loss in losses.items():
        assert (loss[chosen == k] <= last[chosen == k]).all()
        assert (loss[chosen > k] > last[chosen > k]).all()


@pytest.mark.parametrize("depth", [1.0, 1.5, 3.0, 3.9, 4.0])
def test_a_mix_has_the_depth_and_two_neighbours(depth):
    drawn = mixed((1, 3, 4), depth, (50, 1000), np.random.default_rng(0)).numpy()
    assert drawn.mean() == pytest.approx(depth, abs=0.02)
    assert len(np.unique(drawn)) <= 2


def test_rows_are_of_the_same_tokens(scored):
    model, data, _ = scored
    ids, eot = data.test.ids, data.tokenizer.eot_id
    rows = bench_exits(model, ids, eot, POLICIES, seq_len=SEQ_LEN, rows=1, groups=FEWEST)
    table = {row["policy"]: row for row in rows}
    timed = [name for name in POLICIES if name != "again"]
    mixes = [MIX + name for name in ("similarity", "confidence")]
    assert set(table) == {*timed, *mixes, ORACLE}
    for name in timed:
        nats = evaluate_with_exits(
            model, ids[: FEWEST * SEQ_LEN], eot, POLICIES[name], seq_len=SEQ_LEN
        )
        assert table[name]["loss"] == pytest.approx(nats.mean(), abs=1e-5)
    full = table["full depth"]
    for row in rows:
        assert row["above"] == pytest.approx(row["loss"] - full["loss"], abs=1e-9)
        assert row["low"] <= row["above"] <= row["high"]
        assert row["tokens"] == FEWEST * SEQ_LEN
        assert (row["over_mix"] is not None) == (MIX + row["policy"] in table)
        if row["fixed"] is not None:
            assert table[row["fixed"]]["loss"] <= row["loss"]
            assert row["over_fixed"] == pytest.approx(
                row["speedup"] / table[row["fixed"]]["speedup"]
            )
            assert row["over_fixed_low"] <= row["over_fixed"] <= row["over_fixed_high"]
    for mix in mixes:
        asked = table[mix.removeprefix(MIX)]
        assert table[mix]["mean_loops"] == pytest.approx(asked["mean_loops"], abs=0.5)
        assert table[mix]["asks"] == 0 < asked["asks"]
        assert table[mix]["heads"] == 1
    assert table["exit 1"]["multiply_adds"] < full["multiply_adds"]


def test_few_groups_have_no_interval(scored):
    model, data, _ = scored
    fixed = {name: POLICIES[name] for name in ("full depth", "exit 1")}
    ids, eot = data.test.ids, data.tokenizer.eot_id
    *_, row = bench_exits(model, ids, eot, fixed, seq_len=SEQ_LEN, groups=FEWEST - 1)
    assert row["speedup"] > 0 and row["speedup_low"] is row["speedup_high"] is None


def test_a_text_too_short_is_refused(scored):
    model, data, _ = scored
    with pytest.raises(InputError, match="ask for fewer"):
        bench_exits(model, data.test.ids[:40], 0, POLICIES, seq_len=SEQ_LEN, groups=3)
