"""`crt train --dry-run`: what a training would take, from a few of its updates and from counts."""

from dataclasses import dataclass
from datetime import timedelta
from statistics import mean

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.bench.process import ask, own_process
from crt_lib.bench.rehearsal import Rehearsal, rehearse
from crt_lib.files import InputError
from crt_lib.optim import exits_of_update
from crt_lib.runs.machine import machine_memory
from crt_lib.runs.profiles import Profile

MEASURED_SECONDS = 4.0  # of updates, or two if they take longer
DRAWN = 1000  # updates whose drawn exits stand for all


@dataclass(frozen=True)
class Prediction:
    """Seconds of a training that was not done."""

    measured: Rehearsal
    update_seconds: float

    @property
    def seconds(self) -> float:
        """Of all that `crt train` does after the data are read."""
        return self.measured.updates * self.update_seconds + self.measured.evaluation_seconds

    def __str__(self) -> str:
        found, profile = self.measured, self.measured.profile
        config, parameters = profile.train, sum(parameters_by_part(profile.model).values())
        tokens = config.batch_size * config.seq_len * config.grad_accum
        optimizer = found.trial.optimizer / self.update_seconds
        return (
            f"{profile.name}, {profile.recipe}: {parameters:,} parameters, {found.updates:,} "
            f"updates of {tokens:,} positions, in {found.trial.precision}\n"
            f"an update:   {self.update_seconds:.3g} s, {tokens / self.update_seconds:.0f} "
            f"positions/s, the optimizer {optimizer:.1%} of it\n"
            f"in all:      {timedelta(seconds=round(self.seconds))} hours, of it evaluation "
            f"{timedelta(seconds=round(found.evaluation_seconds))}\n"
            f"peak memory: {found.peak_memory / 1e9:.2f} GB of the {machine_memory() / 1e9:.1f} "
            f"here\nfrom {found.trial.updates} measured updates of one micro-batch, a validation "
            "and a checkpoint; nothing was kept"
        )


def predict(profile: Profile) -> Prediction:
    """Rehearse `profile` in a process of its own, and count from that.

    A micro-batch is measured, and an update counts `grad_accum` of them; where updates draw how
    deep they go, their mean cost follows from the multiply-adds. Raises InputError for settings
    that `train` refuses, and for what does not fit into this machine's memory.
    """
    longest = profile.model.max_seq_len
    if profile.train.seq_len > longest:
        raise InputError(
            f"seq_len {profile.train.seq_len} is longer than max_seq_len {longest}; "
            "lower train.seq_len or raise model.max_seq_len"
        )
    with own_process() as process:
        found = ask(process, rehearse, profile, MEASURED_SECONDS)
    model, config, trial = found.profile.model, found.profile.train, found.trial

    def work(first: int, last: int) -> float:  # mean multiply-adds of some updates
        drawn = (exits_of_update(model.head_loops, i, config) for i in range(first, last))
        return mean(sum(multiply_adds(model, config.seq_len, exits).values()) for exits in drawn)

    share = work(0, DRAWN) / work(1, 1 + trial.updates)
    micro_batches = config.grad_accum * trial.micro_batch * share
    return Prediction(found, micro_batches + trial.clipping + trial.optimizer)
