"""`crt train --dry-run`: what a training would take, from a few of its updates and from counts."""

from dataclasses import dataclass
from datetime import timedelta
from statistics import mean

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.bench.rehearsal import rehearse
from crt_lib.bench.trial import WARM_UP, Trial, ask, own_process
from crt_lib.files import InputError
from crt_lib.optim import exits_of_update
from crt_lib.runs.machine import machine_memory
from crt_lib.runs.profiles import Profile

MEASURED_SECONDS = 4.0  # of updates, or two if they take longer
DRAWN = 1000  # updates whose drawn exits stand for all


@dataclass(frozen=True)
class Prediction:
    """A training that was not done: its profile, the model with the tokenizer's vocabulary."""

    profile: Profile
    trial: Trial
    updates: int  # of the training
    evaluation_seconds: float  # of its validations, and of the tables at the end
    peak_memory: int  # bytes

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
            f"peak memory: {self.peak_memory / 1e9:.2f} GB of the {machine_memory() / 1e9:.1f} "
            f"here\nfrom {len(self.trial.updates)} measured updates of one micro-batch, a "
            "validation and a checkpoint; nothing was kept"
        )


def predict(profile: Profile) -> Prediction:
    """Rehearse `profile` in a process of its own, and count from that.

    A micro-batch is measured, and an update counts `grad_accum` of them. Raises InputError for
    settings that `train` refuses, and for what does not fit into this machine's memory.
    """
    length, longest = profile.train.seq_len, profile.model.max_seq_len
    if length > longest:
        raise InputError(
            f"seq_len {length} is longer than max_seq_len {longest}; "
            "lower train.seq_len or raise model.max_seq_len"
        )
    with own_process() as process:
        return Prediction(*ask(process, rehearse, profile, MEASURED_SECONDS))
