"""A trial of a few updates, and the prediction that `crt train --dry-run` makes from it."""

import os

import pytest
import torch
from tiny_models import TINY

from crt_lib import InputError, load_profile
from crt_lib.audit.accounting import parameters_by_part
from crt_lib.bench import dryrun
from crt_lib.bench.dryrun import Prediction, predict, rehearse, scored_positions
from crt_lib.bench.step import with_vocabulary
from crt_lib.bench.trial import (
    WARM_UP,
    Training,
    Trial,
    ask,
    own_process,
    random_batch,
    repeated,
    try_random,
)
from crt_lib.config import TrainConfig
from crt_lib.data import Batch
from crt_lib.optim import exits_of_update
from crt_lib.runs.trained import load_data

SMOKE = with_vocabulary(load_profile("smoke"))
UPDATE = {"other": 2.0, "clipping": 0.5, "optimiser": 0.25}


def test_the_vocabulary_is_the_tokenizers():
    assert SMOKE.model.vocab_size == load_data(load_profile("smoke")).tokenizer.vocab_size
    assert with_vocabulary(load_profile("quick")).model.vocab_size == 2048
    assert with_vocabulary(load_profile("paper")).model.vocab_size == 50_257


def test_random_batches_are_shifted_rows():
    train = TrainConfig(seq_len=6, batch_size=3)
    batch = random_batch(TINY, train, 5)
    assert batch.inputs.shape == (3, 6) and batch.inputs.max() < TINY.vocab_size
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.inputs, random_batch(TINY, train, 5).inputs)


def test_updates_are_those_of_a_training():
    """Every weight moves, and the exits are the ones that `train` would draw."""
    every = Training(SMOKE.model, SMOKE.train.replace(exits_trained="all"))
    before = {name: value.clone() for name, value in every.model.state_dict().items()}
    every.update(0, random_batch(SMOKE.model, SMOKE.train, 0))
    assert all(not torch.equal(v, before[name]) for name, v in every.model.state_dict().items())
    one, asked = Training(SMOKE.model, SMOKE.train), []
    one.loss = lambda inputs, targets, exits: asked.append(exits) or one.model.loop_encoding.sum()
    ids = torch.zeros(1, 2, dtype=torch.int64)
    one.update(7, Batch(ids, ids))
    assert asked == [exits_of_update(SMOKE.model.head_loops, 7, SMOKE.train)]


def test_a_process_of_its_own_holds_what_its_size_needs():
    wider = SMOKE.model.replace(vocab_size=200_000)
    small = try_random(SMOKE.model, SMOKE.train, 0.0, threads=1)
    large = try_random(wider, SMOKE.train.replace(seq_len=2, batch_size=1), 0.0, threads=1)
    held = sum(parameters_by_part(wider).values()) * 4 * 4  # weight, gradient, two moments
    assert large.ends["peak_memory_bytes"] - small.ends["peak_memory_bytes"] > 0.8 * held
    assert len(small.updates) == 1
    assert small.part() > 0 and small.part("clipping") > 0 and small.part("optimiser") > 0


@pytest.mark.parametrize("seconds, most, updates", [(0, 9, 1), (60, 3, 3)])
def test_updates_are_repeated_after_a_warm_up(seconds, most, updates):
    found = repeated(lambda number: number, seconds, most)
    assert found == list(range(WARM_UP, WARM_UP + updates))


def test_no_memory_is_one_line():
    with own_process() as process:
        with pytest.raises(InputError, match="more memory than there is here"):
            ask(process, out_of_memory)
        with pytest.raises(InputError, match="more memory than there is here"):
            ask(process, os._exit, 9)


def out_of_memory():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def made_up(updates):
    trial = Trial([UPDATE] * updates, {"precision": "fp32"})
    known = 30, 7.0, 10**9, 2 * 10**9
    return lambda process, function, profile, seconds: Prediction(profile, trial, *known)


def test_a_prediction_by_hand(monkeypatch):
    monkeypatch.setattr(dryrun, "ask", made_up(updates=1))
    found = predict(SMOKE.replace(train=SMOKE.train.replace(grad_accum=3)))
    assert found.update_seconds == 3 * 2.0 + 0.5 + 0.25
    assert found.seconds == pytest.approx(30 * 6.75 + 7)
    assert "30 updates of 1,536 positions" in str(found) and "1.00 GB of the 2.0" in str(found)


def test_sampled_loops_scale_with_their_work(monkeypatch):
    """Measured at the greatest depth, a mean update of uniformly drawn depths takes less."""
    profile, depth = load_profile("smoke", "paper"), SMOKE.model.head_loops
    seeds = (profile.train.replace(loop_sampling="uniform", seed=seed) for seed in range(100))
    drawn = next(train for train in seeds if exits_of_update(depth, WARM_UP, train) == depth)
    for updates, least, most in ((1, 0.4, 0.8), (1000, 0.98, 1.02)):
        monkeypatch.setattr(dryrun, "ask", made_up(updates))
        update = predict(profile.replace(train=drawn)).update_seconds
        assert least < update / predict(profile).update_seconds < most


@pytest.mark.parametrize("every, updates, validations", [(10, 30, 3), (10, 31, 4), (0, 30, 1)])
def test_validations_are_counted(every, updates, validations):
    data = load_data(load_profile("smoke"))
    config = TrainConfig(eval_every=every, eval_tokens=100)
    profile = SMOKE.replace(train=config, released_lines=2)
    tables = len(data.valid.ids) + len(data.test.ids) + 2 * 2 * 128
    assert scored_positions(profile, data, updates) == 100 * validations + tables


def test_the_rehearsal_reads_text_validates_and_saves():
    found = rehearse(load_profile("smoke"), 0.0)
    assert found.profile.model == SMOKE.model and found.updates == 30
    assert len(found.trial.updates) == 1 and found.evaluation_seconds > 0
    assert found.peak_memory > 1e8


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(InputError, match="4096 tokens, max_seq_len is"):
        predict(SMOKE.replace(train=SMOKE.train.replace(seq_len=4096)))
