"""What an update uses: learning rate, batches, exits, random seed."""

import math

import numpy as np

from crt_lib.config import TrainConfig
from crt_lib.data import PackedWindows, PaddedLines
from crt_lib.text.tokenizer import TokenizedCorpus


def make_batches(config: TrainConfig, data: TokenizedCorpus) -> PackedWindows | PaddedLines:
    """The training batches of `config.batching`; raises InputError when `data` is too small."""
    eot = data.tokenizer.eot_id
    if config.batching == "padded":
        return PaddedLines(data.train.lines, config.seq_len, config.batch_size, config.seed, eot)
    return PackedWindows(data.train.ids, config.seq_len, config.batch_size, config.seed, eot)


def updates_planned(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer updates of a run: `config.updates`, or what `config.epochs` come to."""
    if config.updates is not None:
        return config.updates
    return max(1, math.floor(config.epochs * steps_per_epoch / config.grad_accum))


def learning_rate(update: int, updates: int, config: TrainConfig) -> float:
    """OneCycle with cosine annealing at `update` in 0..updates-1, as torch's OneCycleLR has it.

    From max_lr / 25 up to max_lr over the warm-up, then down to max_lr / 250,000. A function, since
    torch's scheduler divides by zero when the warm-up ends on update 0.
    """
    peak = config.warmup * updates - 1
    low, high, end = config.max_lr / 25, config.max_lr, config.max_lr / 250_000
    if update < peak:
        start, stop, share = low, high, update / peak
    else:
        peak = max(peak, 0.0)
        start, stop, share = high, end, (update - peak) / (updates - 1 - peak or 1.0)
    return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2


def exits_of_update(
    head_loops: tuple[int, ...], update: int, config: TrainConfig
) -> tuple[int, ...]:
    """The loops whose heads `update` trains, the deepest being the loops it runs.

    All of `head_loops`, unless `loop_sampling` draws how deep the update goes (then up to the next
    loop with a head), or `exits_trained` draws one exit from those before the deepest.
    """
    rng = np.random.default_rng([config.seed, update, 1])
    exits = head_loops
    if config.loop_sampling != "none":
        deepest = head_loops[-1]
        if config.loop_sampling == "uniform":
            loops = int(rng.integers(1, deepest + 1))
        else:
            sigma = 0.5  # Huginn's: 1 + Poisson(e^tau), tau normal, with the mean `deepest`
            tau = rng.normal(math.log(max(deepest - 1, 1e-9)) - sigma**2 / 2, sigma)
            loops = min(1 + int(rng.poisson(math.exp(tau))), deepest)
        exits = tuple(k for k in head_loops if k < loops)
        exits = (*exits, head_loops[len(exits)])
    if config.exits_trained == "one" and len(exits) > 2:
        exits = (exits[rng.integers(len(exits) - 1)], exits[-1])
    return exits


def random_seed(seed: int, update: int, micro: int) -> int:
    """A seed below 2**63 for each (seed, update, micro-batch)."""
    return int(np.random.SeedSequence([seed, update, micro]).generate_state(1, np.uint64)[0] >> 1)
