"""`crt train --dry-run`: what a training would take, from a few of its updates and from counts."""

import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.bench.trial import WARM_UP, Training, Trial, ask, in_order, own_process, repeated
from crt_lib.checkpoint import save_checkpoint
from crt_lib.data import make_batches, updates_planned
from crt_lib.evaluate import RELEASED_SEQ_LEN, evaluate
from crt_lib.optim import exits_of_update
from crt_lib.runs.machine import machine_memory, peak_memory
from crt_lib.runs.trained import load_data

if TYPE_CHECKING:
    from crt_lib.runs.profiles import Profile
    from crt_lib.text.tokenizer import TokenizedCorpus

MEASURED_SECONDS = 4.0  # of updates, or two if they take longer
DRAWN = 1000  # updates whose drawn exits stand for all


@dataclass(frozen=True)
class Prediction:
    """A training that was not done: its profile, the model with the tokenizer's vocabulary."""

    profile: "Profile"
    trial: Trial
    updates: int  # of the training
    evaluation_seconds: float  # of its validations, and of the tables at the end
    peak_memory: int  # bytes
    memory: int  # bytes that it may have, of the GPU if there is one

    @property
    def update_seconds(self) -> float:
        """Of a mean update: where they draw how deep they go, by the multiply-adds."""
        config, measured = self.profile.train, range(WARM_UP, WARM_UP + len(self.trial.updates))

        def work(number: int) -> int:
            exits = exits_of_update(self.profile.model.head_loops, number, config)
            return sum(multiply_adds(self.profile.model, config.seq_len, exits).values())

        share = mean(map(work, range(DRAWN))) / mean(map(work, measured))
        return self.trial.update(config.grad_accum * share)

    @property
    def seconds(self) -> float:
        """Of all that `crt train` does after the data are read."""
        return self.updates * self.update_seconds + self.evaluation_seconds

    def __str__(self) -> str:
        profile, config, update = self.profile, self.profile.train, self.update_seconds
        parameters = sum(parameters_by_part(profile.model).values())
        tokens = config.batch_size * config.seq_len * config.grad_accum
        return (
            f"{profile.name}, {profile.recipe}: {parameters:,} parameters, {self.updates:,} "
            f"updates of {tokens:,} positions, in {self.trial.ends['precision']}\n"
            f"an update:   {update:.3g} s, {tokens / update:.0f} positions/s, the optimizer "
            f"{self.trial.part('optimiser') / update:.1%} of it\n"
            f"in all:      {timedelta(seconds=round(self.seconds))} hours, of it evaluation "
            f"{timedelta(seconds=round(self.evaluation_seconds))}\n"
            f"peak memory: {self.peak_memory / 1e9:.2f} GB of the {self.memory / 1e9:.1f} "
            f"here\nfrom {len(self.trial.updates)} measured updates of one micro-batch, a "
            "validation and a checkpoint; nothing was kept"
        )


def predict(profile: "Profile", gigabytes: float | None = None) -> Prediction:
    """`rehearse` in a process of its own, with at most `gigabytes` of the GPU.

    Raises InputError for settings that a training refuses, and for what does not fit into this
    machine's memory, or the GPU's.
    """
    with own_process(gigabytes=gigabytes) as process:
        found = ask(process, rehearse, profile, MEASURED_SECONDS)
    return replace(found, memory=int(gigabytes * 1e9)) if gigabytes else found


def rehearse(profile: "Profile", seconds: float) -> Prediction:
    """Updates of `profile` for about `seconds`, a validation and a checkpoint; what follows.

    A micro-batch is measured, and an update counts `grad_accum` of them.
    """
    import accelerate  # noqa: F401  its memory is the training's

    data, config = load_data(profile), profile.train
    profile = profile.replace(model=profile.model.replace(vocab_size=data.tokenizer.vocab_size))
    batches, training = make_batches(config, data), Training(profile.model, config)
    batch_of = in_order(batches)
    updates = repeated(lambda number: training.update(number, batch_of(number)), seconds)
    trial = Trial(updates, {"precision": training.precision})
    rows, valid = max(8, config.batch_size), len(data.valid.ids)
    count = min(rows * config.seq_len, config.eval_tokens or valid, valid)
    how: dict[str, Any] = {"seq_len": config.seq_len, "batch_size": rows, "max_tokens": count}
    started = time.perf_counter()
    evaluate(training.model, data.valid, data.tokenizer.eot_id, **how)
    a_position = (time.perf_counter() - started) / count
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last", training.model, {}, training.optimizers)
    planned = updates_planned(config, batches.steps_per_epoch)
    evaluation = a_position * scored_positions(profile, data, planned)
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else machine_memory()
    return Prediction(profile, trial, planned, evaluation, peak_memory(), memory)


def scored_positions(profile: "Profile", data: "TokenizedCorpus", updates: int) -> int:
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
