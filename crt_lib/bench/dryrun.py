"""`crt train --dry-run`: what a training would take, from a few of its updates and from counts."""

from dataclasses import dataclass
from statistics import mean

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.bench.trial import Trial, run_rehearsal
from crt_lib.data import make_batches, updates_planned
from crt_lib.evaluate import RELEASED_SEQ_LEN
from crt_lib.files import InputError
from crt_lib.optim import exits_of_update
from crt_lib.runs.machine import machine_memory
from crt_lib.runs.profiles import Profile
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
                f"from {len(self.trial.exits)} measured updates of one micro-batch, a validation "
                "and a checkpoint; nothing was kept",
            ]
        )


def predict(profile: Profile) -> Prediction:
    """Measure a few updates of `profile` in a process of its own, and count from them.

    A micro-batch is measured, and an update counts `grad_accum` of them; where updates draw how
    deep they go, their mean cost follows from the multiply-adds. Raises InputError for settings
    that `train` refuses, and for what cannot fit into this machine's memory.
    """
    from crt_lib.runs.trained import load_data

    data = load_data(profile)
    profile = profile.replace(model=profile.model.replace(vocab_size=data.tokenizer.vocab_size))
    config = profile.train
    if config.seq_len > profile.model.max_seq_len:
        raise InputError(
            f"seq_len {config.seq_len} is longer than max_seq_len {profile.model.max_seq_len}; "
            "lower train.seq_len or raise model.max_seq_len"
        )
    updates = updates_planned(config, make_batches(config, data).steps_per_epoch)
    least, memory = least_memory(profile), machine_memory()
    if least > memory:
        raise InputError(
            f"training {profile.name} needs at least {least / 1e9:.1f} GB for weights, gradients, "
            f"moments and activations; this machine has {memory / 1e9:.1f}"
        )
    trial = run_rehearsal(profile, MEASURED_SECONDS)
    micro_batch = trial.micro_batch * _drawn_share(profile, trial)
    update = config.grad_accum * micro_batch + trial.clipping + trial.optimizer
    scored = scored_positions(profile, data, updates)
    return Prediction(profile, trial, updates, update, scored * trial.evaluation)


def least_memory(profile: Profile) -> int:
    """Bytes below which no training of `profile` stays: a bound to refuse by, no prediction.

    Weights, gradients and moments in float32; without checkpointing also, for each block, the
    inputs of its products in half precision.
    """
    model, config = profile.model, profile.train
    held = 3 if config.optimizer == "muon" else 4
    numbers = held * sum(parameters_by_part(model).values())
    if config.gradient_checkpointing:
        return 4 * numbers
    positions = config.batch_size * config.seq_len
    a_block = model.d_model * (8 if not hasattr(model, "n_cycles") else 4 + 5 * model.n_cycles)
    return 4 * numbers + 2 * positions * model.n_loops * a_block


def scored_positions(profile: Profile, data: TokenizedCorpus, updates: int) -> int:
    """Positions that `crt train` scores: its validations, and what its tables need at the end."""
    config = profile.train
    line = min(RELEASED_SEQ_LEN, profile.model.max_seq_len)
    validations = updates // config.eval_every if config.eval_every else 0
    validations += not config.eval_every or updates % config.eval_every > 0
    tables = 0
    for split in (data.valid, data.test):
        lines = len(released_lines(split.text))
        tables += len(split.ids) + line * min(lines, profile.released_lines or lines)
    return validations * min(config.eval_tokens, len(data.valid.ids)) + tables


def _drawn_share(profile: Profile, trial: Trial) -> float:
    """Mean multiply-adds of an update's forward pass over those of the measured ones."""
    config, heads = profile.train, profile.model.head_loops
    if config.loop_sampling == "none":
        return 1.0

    def cost(exits: tuple[int, ...]) -> int:
        return sum(multiply_adds(profile.model, config.seq_len, exits).values())

    planned = mean(cost(exits_of_update(heads, i, config)) for i in range(DRAWN))
    return planned / mean(map(cost, trial.exits))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
