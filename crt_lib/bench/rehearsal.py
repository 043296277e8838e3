"""A training in small: a few of its updates, a validation and a checkpoint."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from crt_lib.bench.trial import Training, Trial, measure
from crt_lib.checkpoint import save_checkpoint
from crt_lib.data import make_batches, updates_planned
from crt_lib.evaluate import RELEASED_SEQ_LEN, evaluate
from crt_lib.runs.manifest import peak_memory
from crt_lib.runs.profiles import Profile
from crt_lib.runs.run import load_data
from crt_lib.text.tokenizer import TokenizedCorpus


@dataclass(frozen=True)
class Rehearsal:
    """Measured updates of `profile`, its model with the tokenizer's vocabulary, and its plan."""

    profile: Profile
    trial: Trial
    updates: int  # of the training
    evaluation_seconds: float  # of its validations, and of the tables at the end
    peak_memory: int  # bytes


def rehearse(profile: Profile, seconds: float) -> Rehearsal:
    """Measure `profile` on its text, for about `seconds` of updates, in this process."""
    import accelerate  # noqa: F401  its memory is the training's

    data, config = load_data(profile), profile.train
    model = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    batches = make_batches(config, data)
    training = Training(model, config)
    steps = batches.steps_per_epoch
    trial = measure(training, lambda number: batches.batch(*divmod(number, steps)), seconds)
    valid, eot = data.valid, data.tokenizer.eot_id
    length, rows = config.seq_len, max(8, config.batch_size)
    count = min(rows * length, config.eval_tokens or len(valid.ids), len(valid.ids))
    started = time.perf_counter()
    evaluate(training.model, valid, eot, seq_len=length, batch_size=rows, max_tokens=count)
    a_position = (time.perf_counter() - started) / count
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last", training.model, {}, training.optimizers)
    updates = updates_planned(config, steps)
    evaluation = a_position * scored_positions(profile, data, updates)
    return Rehearsal(profile.replace(model=model), trial, updates, evaluation, peak_memory())


def scored_positions(profile: Profile, data: TokenizedCorpus, updates: int) -> int:
    """Positions that `crt train` scores: its validations, and what its tables need at the end."""
    config = profile.train
    line = min(RELEASED_SEQ_LEN, profile.model.max_seq_len)
    validations = -(-updates // config.eval_every) if config.eval_every else 1
    tables = 0
    for split in (data.valid, data.test):
        lines = len(split.lines)
        tables += len(split.ids) + line * min(lines, profile.released_lines or lines)
    valid = len(data.valid.ids)
    return validations * min(config.eval_tokens or valid, valid) + tables
