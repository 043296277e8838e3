"""`crt train --dry-run`: what a training would take, from a few of its updates and from counts."""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.bench.trial import Training, Trial, ask, measure, own_process
from crt_lib.checkpoint import save_checkpoint
from crt_lib.data import make_batches, updates_planned
from crt_lib.evaluate import RELEASED_SEQ_LEN, evaluate
from crt_lib.files import InputError
from crt_lib.optim import exits_of_update
from crt_lib.runs.machine import machine_memory
from crt_lib.runs.manifest import peak_memory
from crt_lib.runs.profiles import Profile
from crt_lib.runs.run import load_data
from crt_lib.text.corpus import released_lines
from crt_lib.text.tokenizer import TokenizedCorpus

MEASURED_SECONDS = 4.0  # of updates, or two if they take longer
DRAWN = 1000  # updates whose drawn exits stand for all


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of a training that was not done."""

    profile: Profile
    trial: Trial
    updates: int
    update_seconds: float
    evaluation_seconds: float  # validations, and the tables at the end

    @property
    def seconds(self) -> float:
        """Of all that `crt train` does after the data are read."""
        return self.updates * self.update_seconds + self.evaluation_seconds

    def __str__(self) -> str:
        config, parameters = self.profile.train, parameters_by_part(self.profile.model)
        tokens = config.batch_size * config.seq_len * config.grad_accum
        speed, optimizer = (v / self.update_seconds for v in (tokens, self.trial.optimizer))
        return "\n".join(
            [
                f"{self.profile.name}, {self.profile.recipe}: {sum(parameters.values()):,} "
                f"parameters, {self.updates:,} updates of {tokens:,} positions, "
                f"in {self.trial.precision}",
                f"an update:   {self.update_seconds:.3g} s, {speed:.0f} positions/s, "
                f"the optimizer {optimizer:.1%} of it",
                f"in all:      {_duration(self.seconds)}, of it evaluation "
                f"{_duration(self.evaluation_seconds)}",
                f"peak memory: {self.trial.peak_memory / 1e9:.2f} GB "
                f"of the {machine_memory() / 1e9:.1f} here",
                f"from {self.trial.updates} measured updates of one micro-batch, a validation "
                "and a checkpoint; nothing was kept",
            ]
        )


def predict(profile: Profile) -> Prediction:
    """Measure a few updates of `profile` in a process of its own, and count from them.

    A micro-batch is measured, and an update counts `grad_accum` of them; where updates draw how
    deep they go, their mean cost follows from the multiply-adds. Raises InputError for settings
    that `train` refuses, and for what does not fit into this machine's memory.
    """
    data, config = load_data(profile), profile.train
    model = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    profile = profile.replace(model=model)
    if config.seq_len > model.max_seq_len:
        raise InputError(
            f"seq_len {config.seq_len} is longer than max_seq_len {model.max_seq_len}; "
            "lower train.seq_len or raise model.max_seq_len"
        )
    updates = updates_planned(config, make_batches(config, data).steps_per_epoch)
    with own_process() as process:
        trial = ask(process, _rehearse, profile, MEASURED_SECONDS)

    def work(first: int, last: int) -> float:  # mean multiply-adds of some updates
        drawn = (exits_of_update(model.head_loops, i, config) for i in range(first, last))
        return mean(sum(multiply_adds(model, config.seq_len, exits).values()) for exits in drawn)

    micro_batch = trial.micro_batch * work(0, DRAWN) / work(1, 1 + trial.updates)
    update = config.grad_accum * micro_batch + trial.clipping + trial.optimizer
    scored = scored_positions(profile, data, updates)
    return Prediction(profile, trial, updates, update, scored * trial.evaluation)


def scored_positions(profile: Profile, data: TokenizedCorpus, updates: int) -> int:
    """Positions that `crt train` scores: its validations, and what its tables need at the end."""
    config = profile.train
    line = min(RELEASED_SEQ_LEN, profile.model.max_seq_len)
    validations = -(-updates // config.eval_every) if config.eval_every else 1
    tables = 0
    for split in (data.valid, data.test):
        lines = len(released_lines(split.text.text))
        tables += len(split.ids) + line * min(lines, profile.released_lines or lines)
    return validations * min(config.eval_tokens, len(data.valid.ids)) + tables


def _rehearse(profile: Profile, seconds: float) -> Trial:
    """Updates on the profile's text, and what `crt train` does besides: validate and save."""
    import accelerate  # noqa: F401  its memory is the training's

    data, config = load_data(profile), profile.train
    training = Training(profile.model, config)
    trial = measure(training, make_batches(config, data), seconds)
    rows = max(8, config.batch_size)
    scored = min(rows * config.seq_len, config.eval_tokens, len(data.valid.ids))
    eot, model, started = data.tokenizer.eot_id, training.model, time.perf_counter()
    evaluate(model, data.valid, eot, seq_len=config.seq_len, batch_size=rows, max_tokens=scored)
    evaluation = (time.perf_counter() - started) / scored
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last", model, {}, training.optimizers)
    return dataclasses.replace(trial, evaluation=evaluation, peak_memory=peak_memory())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
