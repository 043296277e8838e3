"""`crt bench cost`: what a training step costs against its size, a change at a time."""

from collections.abc import Callable
from typing import Any

import torch

from crt_lib.bench.trial import run_trial, with_vocabulary
from crt_lib.config import GPT2Config, ModelConfig, TrainConfig
from crt_lib.runs.machine import measured_on
from crt_lib.runs.profiles import load_profile

BASE = {"batch": 8, "length": 256, "loops": 4, "d": 256}  # `crt2` at small
AXES = {
    "batch": (2, 8, 32),
    "length": (64, 256, 512),
    "loops": (2, 4, 8),
    "d": (128, 256, 512),
}


def bench_cost(seconds: float, echo: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """A row a size and number of threads: tokens/s of an update, and its process's peak memory.

    The recipe `crt2` at the size of the profile small (BASE), each of AXES changed alone, on random
    ids, every row in a process of its own, after about `seconds` of updates. With all threads and,
    where there are more, with one. `echo` gets each row as it comes.
    """
    sizes = [BASE | {axis: value} for axis, values in AXES.items() for value in values]
    sizes = list({tuple(size.items()): size for size in sizes}.values())
    rows = []
    for threads in sorted({torch.get_num_threads(), 1}, reverse=True):
        for size in sizes:
            model, train = settings(**size)
            trial = run_trial(model, train, seconds, threads)
            update = trial.update(1)
            row = {
                **size,
                "tokens_per_second": round(size["batch"] * size["length"] / update, 1),
                "update_ms": round(1000 * update, 2),
                "peak_memory_bytes": trial.peak_memory,
                "precision": trial.precision,
                **measured_on(threads),
            }
            rows.append(row)
            if echo:
                echo("  ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def settings(
    batch: int, length: int, loops: int, d: int
) -> tuple[ModelConfig | GPT2Config, TrainConfig]:
    """`crt2` at small in another size: heads of 32 features, an exit after every loop."""
    profile = with_vocabulary(load_profile("small"))
    model = profile.model.replace(
        d_model=d, embed_dim=d, n_heads=d // 32, n_loops=loops, exit_loops=tuple(range(1, loops))
    )
    return model, profile.train.replace(batch_size=batch, seq_len=length)
