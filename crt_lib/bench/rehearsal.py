"""A training in small: a few of its updates, a validation and a checkpoint."""

import tempfile
import time
from pathlib import Path
from typing import Any

from crt_lib.bench.trial import Training, Trial, in_order, repeated
from crt_lib.checkpoint import save_checkpoint
from crt_lib.data import make_batches, updates_planned
from crt_lib.evaluate import RELEASED_SEQ_LEN, evaluate
from crt_lib.runs.machine import peak_memory
from crt_lib.runs.profiles import Profile
from crt_lib.runs.trained import load_data
from crt_lib.text.tokenizer import TokenizedCorpus


def rehearse(profile: Profile, seconds: float) -> tuple[Profile, Trial, int, float, int]:
    """Updates of `profile` for about `seconds`, a validation and a checkpoint, in this process.

    The profile with the tokenizer's vocabulary, the updates measured and planned, seconds of
    evaluation in all, and the peak memory in bytes.
    """
    import accelerate  # noqa: F401  its memory is the training's

    data, config = load_data(profile), profile.train
    profile = profile.replace(model=profile.model.replace(vocab_size=data.tokenizer.vocab_size))
    batches, training = make_batches(config, data), Training(profile.model, config)
    batch_of = in_order(batches)
    updates = repeated(lambda number: training.update(number, batch_of(number)), seconds)
    trial = Trial(updates, {"precision": training.precision})
    rows = max(8, config.batch_size)
    valid = len(data.valid.ids)
    count = min(rows * config.seq_len, config.eval_tokens or valid, valid)
    how: dict[str, Any] = {"seq_len": config.seq_len, "batch_size": rows, "max_tokens": count}
    started = time.perf_counter()
    evaluate(training.model, data.valid, data.tokenizer.eot_id, **how)
    a_position = (time.perf_counter() - started) / count
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last", training.model, {}, training.optimizers)
    planned = updates_planned(config, batches.steps_per_epoch)
    evaluation = a_position * scored_positions(profile, data, planned)
    return profile, trial, planned, evaluation, peak_memory()


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
