"""A trial of a few updates, and the prediction that `crt train --dry-run` makes from it."""

import dataclasses

import pytest
import torch

from crt_lib import InputError, load_profile
from crt_lib.audit.accounting import parameters_by_part
from crt_lib.bench import dryrun as costs, trial
from crt_lib.bench.dryrun import least_memory, predict, scored_positions
from crt_lib.bench.trial import RandomBatches, Trial, measure_updates, run_trial, with_vocabulary
from crt_lib.config import TrainConfig
from crt_lib.optim import exits_of_update
from crt_lib.runs.trained import load_data

SMOKE = with_vocabulary(load_profile("smoke"))
MADE_UP = Trial("fp32", 2.0, 0.5, 0.25, exits=((2, 4),), evaluation=0.01, peak_memory=10**9)


def batches_of(profile):
    train = profile.train
    return RandomBatches(profile.model.vocab_size, train.seq_len, train.batch_size)


def test_the_vocabulary_is_the_tokenizers():
    assert SMOKE.model.vocab_size == load_data(load_profile("smoke")).tokenizer.vocab_size
    assert with_vocabulary(load_profile("quick")).model.vocab_size == 2048
    assert with_vocabulary(load_profile("paper")).model.vocab_size == 50_257


def test_random_batches_are_shifted_rows():
    batch = RandomBatches(11, 6, 3).batch(0, 5)
    assert batch.inputs.shape == (3, 6) and batch.inputs.max() < 11
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.inputs, RandomBatches(11, 6, 3).batch(0, 5).inputs)


def test_updates_are_those_of_a_training():
    """Every weight moves, and the exits are the ones that `train` would draw."""
    every = SMOKE.train.replace(exits_trained="all")
    _, model, _ = measure_updates(SMOKE.model, every, batches_of(SMOKE), 0.0)
    torch.manual_seed(every.seed)
    before = type(model)(SMOKE.model).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found, _, _ = measure_updates(SMOKE.model, SMOKE.train, batches_of(SMOKE), 0.0)
    assert found.exits == (exits_of_update(SMOKE.model.head_loops, 1, SMOKE.train),)
    assert found.micro_batch > 0 and found.clipping > 0 and found.optimizer > 0


def test_a_process_of_its_own_holds_what_its_size_needs():
    wider = SMOKE.model.replace(vocab_size=200_000)
    small = run_trial(SMOKE.model, SMOKE.train, 0.0, threads=1)
    large = run_trial(wider, SMOKE.train.replace(seq_len=2, batch_size=1), 0.0, threads=1)
    held = sum(parameters_by_part(wider).values()) * 4 * 4  # weight, gradient, two moments
    assert large.peak_memory - small.peak_memory > 0.8 * held


def test_no_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(trial, "_on_random_ids", out_of_memory)
    with pytest.raises(InputError, match="more memory than there is here"):
        run_trial(SMOKE.model, SMOKE.train, 0.0)


def out_of_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_a_prediction_by_hand(monkeypatch):
    monkeypatch.setattr(costs, "run_rehearsal", lambda profile, seconds: MADE_UP)
    profile = load_profile("smoke")
    profile = profile.replace(train=profile.train.replace(grad_accum=3))
    found = predict(profile)
    assert found.update_seconds == 3 * 2.0 + 0.5 + 0.25
    data = load_data(profile)
    valid, test = len(data.valid.ids), len(data.test.ids)
    lines = 128 * (len(data.valid.lines) + len(data.test.lines))
    scored = 3 * min(2048, valid) + valid + test + lines
    assert found.seconds == pytest.approx(30 * 6.75 + 0.01 * scored)
    assert "30 updates of 1,536 positions" in str(found) and "1.00 GB" in str(found)


def test_sampled_loops_scale_with_their_work(monkeypatch):
    """Measured at the greatest depth, a mean update of uniformly drawn depths takes less."""
    full = dataclasses.replace(MADE_UP, exits=((1, 2, 3, 4),))
    monkeypatch.setattr(costs, "run_rehearsal", lambda profile, seconds: full)
    profile = load_profile("smoke", "paper")
    update = predict(profile).update_seconds
    drawn = profile.replace(train=profile.train.replace(loop_sampling="uniform"))
    assert 0.4 < predict(drawn).update_seconds / update < 0.8


@pytest.mark.parametrize("every, updates, validations", [(10, 30, 3), (10, 31, 4), (0, 30, 1)])
def test_validations_are_counted(every, updates, validations):
    data = load_data(load_profile("smoke"))
    config = TrainConfig(eval_every=every, eval_tokens=100)
    profile = SMOKE.replace(train=config, released_lines=2)
    tables = len(data.valid.ids) + len(data.test.ids) + 2 * 2 * 128
    assert scored_positions(profile, data, updates) == 100 * validations + tables


def test_what_cannot_fit_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(costs, "machine_memory", lambda: least_memory(SMOKE) - 1)
    monkeypatch.setattr(costs, "run_rehearsal", lambda *_: pytest.fail("it was tried"))
    with pytest.raises(InputError, match="needs at least"):
        predict(SMOKE)
    longer = SMOKE.replace(train=SMOKE.train.replace(batch_size=16))
    assert least_memory(longer) > least_memory(SMOKE)
    kept = longer.replace(train=longer.train.replace(gradient_checkpointing=True))
    assert least_memory(kept) < least_memory(SMOKE)


def test_the_rehearsal_reads_text_validates_and_saves():
    found = trial._rehearse(SMOKE, 0.0)
    assert found.evaluation > 0 and len(found.exits) == 1
