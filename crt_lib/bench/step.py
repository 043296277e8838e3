"""`crt bench step` and `crt bench cost`: what an update costs, what saves time in it, its size.

On random ids: what a step takes does not depend on the text, and no corpus is needed.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from crt_lib import loss
from crt_lib.bench.trial import Side, Training, Trial, random_batch, take_turns, try_random
from crt_lib.config import AnyModelConfig, TrainConfig
from crt_lib.files import InputError
from crt_lib.runs.machine import measured_on
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.runs.trained import load_data


class Plain(Training):
    """A training whose loss keeps the logits whole, as all do in its process from then on."""

    def __init__(self, model: AnyModelConfig, config: TrainConfig):
        super().__init__(model, config)
        loss.FUSED = False


PATHS: dict[str, tuple[type[Training], dict[str, Any]]] = {  # path -> kind, settings
    "plain": (Plain, {"exits_trained": "all"}),
    "fused loss": (Training, {"exits_trained": "all"}),
    "fused loss, one exit": (Training, {"exits_trained": "one"}),
    "fused loss, one exit, compiled": (Training, {"exits_trained": "one", "compile": True}),
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


def bench_cost(seconds: float) -> Rows:
    """A row a size and number of threads: tokens/s of an update, and its process's peak memory.

    The recipe `crt2` at the size of the profile small (BASE), each of AXES changed alone, every row
    in a process of its own, after about `seconds` of updates. With all threads and, where there are
    more, with one.
    """
    changed = [BASE | {axis: value} for axis, values in AXES.items() for value in values]
    sizes = [size for i, size in enumerate(changed) if size not in changed[:i]]
    many, rows = sorted({torch.get_num_threads(), 1}, reverse=True), []
    for threads, size in tqdm(list(itertools.product(many, sizes)), "sizes", disable=None):
        found = try_random(*settings(**size), seconds, threads=threads)
        row = size | {
            "tokens_per_second": round(size["batch"] * size["length"] / found.update(), 1),
            "update_ms": round(1000 * found.update(), 2),
        }
        row |= {name: found.ends[name] for name in ("peak_memory_bytes", "precision")}
        rows.append(row | measured_on(threads))
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
    known = int(size or 50_257)  # of bpe:<size> and of gpt2
    vocabulary = load_data(profile).tokenizer.vocab_size if kind == "word" else known
    return profile.replace(model=profile.model.replace(vocab_size=vocabulary))


def bench_updates(sizes: Sequence[str]) -> Rows:
    """What an update's time goes to, a row a profile and recipe (paper: AdamW; crt2: Muon).

    A micro-batch is measured; `forward_backward_ms` counts the update's `micro_batches` of them.
    """
    rows = []
    for size, recipe in itertools.product(sizes, ("paper", "crt2")):
        profile = with_vocabulary(load_profile(size, recipe))
        made = update_row(profile.train, try_random(profile.model, profile.train, SECONDS))
        rows.append({"profile": size, "recipe": recipe} | made)
    return rows


def update_row(train: TrainConfig, found: Trial) -> dict[str, Any]:
    """What a trial says of an update of `train`, all its micro-batches counted."""
    update = found.update(train.grad_accum)
    return {
        "optimizer": train.optimizer,
        "precision": found.ends["precision"],
        "rows": train.batch_size,
        "seq_len": train.seq_len,
        "micro_batches": train.grad_accum,
        "forward_backward_ms": round(1000 * train.grad_accum * found.part(), 1),
        "clipping_ms": round(1000 * found.part("clipping"), 2),
        "optimizer_ms": round(1000 * found.part("optimiser"), 2),
        "update_ms": round(1000 * update, 1),
        "optimizer_share": round(found.part("optimiser") / update, 4),
        "measured_updates": len(found.updates),
        **measured_on(),
    }


def bench_step(profile: Profile, steps: int) -> Rows:
    """A row a path: the median seconds of `steps` updates, and the speed against `plain`.

    The paths take turns. `plain` keeps an exit's logits whole and trains every exit. Raises
    InputError where there is nothing to choose from: a GPU has another loss.
    """
    if torch.cuda.is_available():
        raise InputError("crt bench step compares the paths of a CPU; hide the GPU from it")
    model, train = with_vocabulary(profile).model, profile.train
    sides: dict[str, Side] = {
        name: (kind, model, train.replace(**own)) for name, (kind, own) in PATHS.items()
    }
    turns = take_turns(sides, steps=steps)
    return [
        {
            "path": name,
            "seconds_per_step": round(own.update(), 4),
            "tokens_per_second": round(train.batch_size * train.seq_len / own.update(), 1),
            "speedup": round(turns["plain"].update() / own.update(), 3),
            "profile": profile.name,
            "recipe": profile.recipe,
            "precision": own.ends["precision"],
            **measured_on(),
        }
        for name, own in turns.items()
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
