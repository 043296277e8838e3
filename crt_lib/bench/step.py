"""`crt bench step` and `crt bench cost`: what an update costs, what saves time in it, its size.

On random ids: what a step takes does not depend on the text, and no corpus is needed.
"""

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from crt_lib import loss
from crt_lib.bench.process import ask, own_process
from crt_lib.bench.trial import Training, Trial, measure_on_random, random_batch
from crt_lib.config import AnyModelConfig, TrainConfig
from crt_lib.files import InputError
from crt_lib.runs.machine import measured_on
from crt_lib.runs.profiles import Profile, load_profile

PATHS: dict[str, tuple[bool, dict[str, Any]]] = {  # path -> fused loss, settings
    "plain": (False, {"exits_trained": "all"}),
    "fused loss": (True, {"exits_trained": "all"}),
    "fused loss, one exit": (True, {"exits_trained": "one"}),
    "fused loss, one exit, compiled": (True, {"exits_trained": "one", "compile": True}),
}
BASE = {"batch": 8, "length": 256, "loops": 4, "d": 256}  # `crt2` at small
AXES = {
    "batch": (2, 8, 32),
    "length": (64, 256, 512),
    "loops": (2, 4, 8),
    "d": (128, 256, 512),
}
TOP = 5  # operations
SECONDS = 4.0  # of updates, for a row of `bench_updates`
Rows = list[dict[str, Any]]


def bench_cost(seconds: float, echo: Callable[[str], None]) -> Rows:
    """A row a size and number of threads: tokens/s of an update, and its process's peak memory.

    The recipe `crt2` at the size of the profile small (BASE), each of AXES changed alone, every row
    in a process of its own, after about `seconds` of updates. With all threads and, where there are
    more, with one. `echo` gets each row as it comes.
    """
    sizes = [BASE | {axis: value} for axis, values in AXES.items() for value in values]
    sizes = [size for i, size in enumerate(sizes) if size not in sizes[:i]]
    rows = []
    for threads in sorted({torch.get_num_threads(), 1}, reverse=True):
        for size in sizes:
            found = run_trial(*settings(**size), seconds, threads)
            update = found.update(1)
            row = {
                **size,
                "tokens_per_second": round(size["batch"] * size["length"] / update, 1),
                "update_ms": round(1000 * update, 2),
                "peak_memory_bytes": found.peak_memory,
                "precision": found.precision,
                **measured_on(threads),
            }
            rows.append(row)
            echo("  ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def settings(batch: int, length: int, loops: int, d: int) -> tuple[AnyModelConfig, TrainConfig]:
    """`crt2` at small in another size: heads of 32 features, an exit after every loop."""
    profile = with_vocabulary(load_profile("small"))
    model = profile.model.replace(
        d_model=d, embed_dim=d, n_heads=d // 32, n_loops=loops, exit_loops=tuple(range(1, loops))
    )
    return model, profile.train.replace(batch_size=batch, seq_len=length)


def with_vocabulary(profile: Profile) -> Profile:
    """`profile` with its tokenizer's vocabulary size in the model, reading a corpus only for words.

    Raises InputError as `load_tokenizer`, when the tokenizer is made of the corpus's words.
    """
    kind, _, size = profile.tokenizer.partition(":")
    vocabulary = 50_257 if kind == "gpt2" else int(size or 0)
    if kind == "word":
        from crt_lib.runs.run import load_data

        vocabulary = load_data(profile).tokenizer.vocab_size
    return profile.replace(model=profile.model.replace(vocab_size=vocabulary))


def run_trial(
    model: AnyModelConfig, train: TrainConfig, seconds: float, threads: int | None = None
) -> Trial:
    """`measure_on_random` in a process of its own; raises InputError as `ask`."""
    with own_process(threads) as process:
        return ask(process, measure_on_random, model, train, seconds)


def bench_updates(sizes: Sequence[str]) -> Rows:
    """What an update's time goes to, a row a profile and recipe (paper: AdamW; crt2: Muon).

    A micro-batch is measured; `forward_backward_ms` counts the update's `micro_batches` of them.
    """
    rows = []
    for size, recipe in itertools.product(sizes, ("paper", "crt2")):
        profile = with_vocabulary(load_profile(size, recipe))
        train = profile.train
        found = run_trial(profile.model, train, SECONDS)
        update = found.update(train.grad_accum)
        rows.append(
            {
                "profile": size,
                "recipe": recipe,
                "optimizer": train.optimizer,
                "precision": found.precision,
                "rows": train.batch_size,
                "seq_len": train.seq_len,
                "micro_batches": train.grad_accum,
                "forward_backward_ms": round(1000 * train.grad_accum * found.micro_batch, 1),
                "clipping_ms": round(1000 * found.clipping, 2),
                "optimizer_ms": round(1000 * found.optimizer, 2),
                "update_ms": round(1000 * update, 1),
                "optimizer_share": round(found.optimizer / update, 4),
                "measured_updates": found.updates,
                **measured_on(),
            }
        )
    return rows


def bench_step(profile: Profile, steps: int) -> Rows:
    """A row a path: the median seconds of `steps` updates, and the speed against `plain`.

    The paths take turns, after two unmeasured updates each. `plain` keeps an exit's logits whole
    and trains every exit. Raises InputError where there is nothing to choose from: a GPU has
    another loss.
    """
    if torch.cuda.is_available():
        raise InputError("crt bench step compares the paths of a CPU; hide the GPU from it")
    model, train = with_vocabulary(profile).model, profile.train
    runs = {name: Training(model, train.replace(**own)) for name, (_, own) in PATHS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for i in range(2 + steps):
            for name, run in runs.items():
                loss.FUSED = PATHS[name][0]
                update = run.update(i, random_batch(model, train, i))
                seconds[name].append(sum(update.values()))
    finally:
        loss.FUSED = True
    medians = {name: median(times[2:]) for name, times in seconds.items()}
    tokens = train.batch_size * train.seq_len
    return [
        {
            "path": name,
            "seconds_per_step": round(medians[name], 4),
            "tokens_per_second": round(tokens / medians[name], 1),
            "speedup": round(medians["plain"] / medians[name], 3),
            "profile": profile.name,
            "recipe": profile.recipe,
            "precision": run.precision,
            **measured_on(),
        }
        for name, run in runs.items()
    ]


def step_costs(profile: Profile) -> Rows:
    """The TOP operations of an update of the fastest uncompiled path: milliseconds and share.

    Time spent in an operation itself, not in those it calls; forward, backward and optimizer.
    """
    model, train = with_vocabulary(profile).model, profile.train
    run = Training(model, train.replace(**PATHS["fused loss, one exit"][1]))
    for i in range(3):
        run.update(i, random_batch(model, train, i))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run.update(3, random_batch(model, train, 3))
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operation": event.key,
            "milliseconds": round(event.self_cpu_time_total / 1000, 1),
            "share": round(event.self_cpu_time_total / total, 4),
            "calls": event.count,
        }
        for event in events[:TOP]
    ]
