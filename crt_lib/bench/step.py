"""`crt bench step`: the optimiser's share of an update, what the fast paths save, what costs most.

On random ids: what a step takes does not depend on the text, and no corpus is needed.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from crt_lib import loss as loss_module
from crt_lib.bench.trial import RandomBatches, run_trial, with_vocabulary
from crt_lib.config import LanguageModel, make_model
from crt_lib.device import choose_precision
from crt_lib.files import InputError
from crt_lib.loss import total_loss
from crt_lib.optim import exits_of_update, make_optimizers
from crt_lib.runs.machine import measured_on
from crt_lib.runs.profiles import Profile, load_profile

PATHS = {  # path -> fused loss, one exit an update, compiled block
    "plain": (False, False, False),
    "fused loss": (True, False, False),
    "fused loss, one exit": (True, True, False),
    "fused loss, one exit, compiled": (True, True, True),
}


def bench_updates(sizes: Sequence[str], seconds: float = 4.0) -> list[dict[str, Any]]:
    """What an update's time goes to, a row a profile and recipe (paper: AdamW; crt2: Muon).

    Medians over about `seconds` of updates, two at least, in the precision that the profile gets
    here. A micro-batch is measured; `forward_backward_ms` counts the update's `micro_batches` of
    them. `optimizer_share`: of forward and backward, clipping and step together.
    """
    rows = []
    for size, recipe in itertools.product(sizes, ("paper", "crt2")):
        profile = with_vocabulary(load_profile(size, recipe))
        trial, train = run_trial(profile.model, profile.train, seconds), profile.train
        update = trial.update(train.grad_accum)
        rows.append(
            {
                "profile": size,
                "recipe": recipe,
                "optimizer": train.optimizer,
                "precision": trial.precision,
                "rows": train.batch_size,
                "seq_len": train.seq_len,
                "micro_batches": train.grad_accum,
                "forward_backward_ms": round(1000 * train.grad_accum * trial.micro_batch, 1),
                "clipping_ms": round(1000 * trial.clipping, 2),
                "optimizer_ms": round(1000 * trial.optimizer, 2),
                "update_ms": round(1000 * update, 1),
                "optimizer_share": round(trial.optimizer / update, 4),
                "measured_updates": len(trial.exits),
                **measured_on(),
            }
        )
    return rows


def bench_step(profile: Profile, steps: int) -> list[dict[str, Any]]:
    """A row a path: the median seconds of `steps` training steps, and the speed against `plain`.

    The paths take turns, after two unmeasured steps each. `plain` keeps an exit's logits whole and
    trains every exit. Raises InputError where there is nothing to choose from: a GPU has another
    loss.
    """
    if torch.cuda.is_available():
        raise InputError("crt bench step compares the paths of a CPU; hide the GPU from it")
    make, tokens = _steps(profile)
    runs = {name: make(*path) for name, path in PATHS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(2 + steps):
        for name, step in runs.items():
            started = time.perf_counter()
            step(i)
            if i >= 2:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    precision = choose_precision(
        profile.train.precision, torch.device("cpu"), profile.model.d_model
    ).name
    return [
        {
            "path": name,
            "seconds_per_step": round(median, 4),
            "tokens_per_second": round(tokens / median, 1),
            "speedup": round(medians["plain"] / median, 3),
            "profile": profile.name,
            "recipe": profile.recipe,
            "precision": precision,
            **measured_on(),
        }
        for name, median in medians.items()
    ]


def step_costs(profile: Profile, top: int = 5) -> list[dict[str, Any]]:
    """The `top` operations of a step of the fastest uncompiled path: milliseconds and share.

    Time spent in an operation itself, not in those it calls; forward, backward and update.
    """
    make, _ = _steps(profile)
    step = make(*PATHS["fused loss, one exit"])
    for i in range(3):
        step(i)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(3)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    events = sorted(events, key=lambda event: -event.self_cpu_time_total)[:top]
    return [
        {
            "operation": event.key,
            "milliseconds": round(event.self_cpu_time_total / 1000, 1),
            "share": round(event.self_cpu_time_total / total, 4),
            "calls": event.count,
        }
        for event in events
    ]


def _steps(profile: Profile) -> tuple[Callable[..., Callable[[int], None]], int]:
    """A maker of training steps for a path, and the tokens of a step."""
    config, model_config = profile.train, with_vocabulary(profile).model
    batches = RandomBatches(model_config.vocab_size, config.seq_len, config.batch_size)
    cpu = torch.device("cpu")
    precision = choose_precision(config.precision, cpu, model_config.d_model).name

    def make(fused: bool, one_exit: bool, compiled: bool) -> Callable[[int], None]:
        torch.manual_seed(config.seed)
        model = make_model(model_config).train()
        if compiled:
            model.compile_block()
        optimizers = make_optimizers(model, config)
        drawn = config.replace(exits_trained="one" if one_exit else "all")

        def step(i: int) -> None:
            batch = batches.batch(0, i)
            exits = exits_of_update(model_config.head_loops, i, drawn)
            with _loss_path(fused):
                _loss(model, batch.inputs, batch.targets, exits, precision, config.aux_weight)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return make, config.batch_size * config.seq_len


def _loss(
    model: LanguageModel,
    inputs: Tensor,
    targets: Tensor,
    exits: tuple[int, ...],
    precision: str,
    aux_weight: float,
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = total_loss(model(inputs, exits, targets=targets), aux_weight)
    loss.backward()


@contextlib.contextmanager
def _loss_path(fused: bool) -> Iterator[None]:
    kept, loss_module.FUSED = loss_module.FUSED, fused
    try:
        yield
    finally:
        loss_module.FUSED = kept
