"""Many short trainings compared on valid: equal tokens or equal wall time, several at once."""

import concurrent.futures
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crt_lib.compare import score_documents
from crt_lib.files import InputError
from crt_lib.model import count_parameters
from crt_lib.profiles import Profile
from crt_lib.runfolder import read_timing
from crt_lib.runs import load_data, read_rows, write_rows
from crt_lib.train import TrainResult, train

WARM_UP, TIMED = 2, 6  # updates that measure an arm's speed


@dataclass(frozen=True)
class Trial:
    """One training: an arm's name, and the profile with its learning rate and seed."""

    arm: str
    profile: Profile

    def key(self, minutes: float | None) -> dict[str, Any]:
        """What tells its row from others."""
        config = self.profile.train
        return {
            "arm": self.arm,
            "budget": f"{minutes:g} min" if minutes else f"{config.updates} updates",
            "max_lr": config.max_lr,
            "seed": config.seed,
        }


def grid(
    arms: dict[str, Profile],
    rates: Sequence[float] = (),
    seeds: Sequence[int] = (),
    updates: int | None = None,
) -> list[Trial]:
    """Every arm with every learning rate and seed; without some, the arm's own."""
    trials = []
    for seed in seeds or (None,):
        for name, profile in arms.items():
            for rate in rates or (None,):
                changes = {"max_lr": rate, "seed": seed, "updates": updates}
                changes = {key: value for key, value in changes.items() if value is not None}
                train_config = profile.train.replace(eval_every=0, **changes)
                trials.append(Trial(name, profile.replace(train=train_config)))
    return trials


def search(
    trials: Iterable[Trial],
    out: str | Path,
    *,
    minutes: float | None = None,
    jobs: int = 1,
    threads: int | None = None,
    documents: bool = False,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the trials, `jobs` at a time, and add a row of each to `out`, a CSV file.

    A job has `threads` threads; None: an equal share of the processors.
    Each has its profile's updates, or, given `minutes`, as many as fit into them at its own speed,
    measured first: fixed before the run, so that the learning rate ends where it should. A row has
    the parameters, tokens, seconds and, by exit, the loss in nats on the first `eval_tokens` of
    valid (arms must share a tokenizer). Rows already in `out` are not made again. With `documents`
    each is also scored on test, its last exit's nats by document going to `documents_file(out)`.
    """
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes is {minutes}; it must be positive")
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    out = Path(out)
    rows = read_rows(out) if out.exists() else []
    waiting = [t for t in trials if not any(_is_of(row, t.key(minutes)) for row in rows)]
    if not waiting:
        return rows
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        running = {pool.submit(run_trial, trial, minutes, documents): trial for trial in waiting}
        try:
            for done in concurrent.futures.as_completed(running):
                row, documents = done.result()
                rows.append(row)
                _write(out, rows)
                if documents:
                    _write(documents_file(out), documents)
                echo(
                    f"{row['arm']} lr {row['max_lr']:g} seed {row['seed']}: loss "
                    f"{row['valid_loss']:.3f}, {row['updates']} updates in {row['seconds']:.0f} s"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return rows


def documents_file(out: str | Path) -> Path:
    """The table beside `out` with a row for each trial and document of test."""
    return Path(out).with_name(f"{Path(out).stem}_documents.csv")


def run_trial(
    trial: Trial, minutes: float | None, documents: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One trial, in this process; its row and, if asked for, those of test's documents."""
    data = load_data(trial.profile)
    model_config = trial.profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    config = trial.profile.train
    key = trial.key(minutes)
    with tempfile.TemporaryDirectory() as folder:
        if minutes is not None:
            short = config.replace(updates=WARM_UP + TIMED, eval_every=0, eval_tokens=256)
            _finished(train(model_config, short, data, folder, resume=False, progress=False))
            seconds = [row["seconds"] for row in read_timing(Path(folder))]
            pace = (seconds[-1] - seconds[WARM_UP - 1]) / TIMED
            config = config.replace(updates=max(1, round(60 * minutes / pace)))
        never = 1 << 30
        config = config.replace(eval_every=0, checkpoint_every=never)
        begun = time.process_time()
        result = _finished(train(model_config, config, data, folder, resume=False, progress=False))
        processor = time.process_time() - begun
        seconds = read_timing(Path(folder))[-1]["seconds"]
    last = result.metrics[-1]
    losses = {loop: last[f"valid_loss_{loop}"] for loop in model_config.head_loops}
    row = key | {
        "parameters": count_parameters(result.model),
        "updates": config.updates,
        "tokens": last["tokens"],
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(processor, 1),
        "valid_loss": losses[model_config.n_loops],
        "exit_losses": " ".join(f"{loop}:{loss:.4f}" for loop, loss in losses.items()),
    }
    if not documents:
        return row, []
    scored = score_documents(result.model, data, "test", config.seq_len)
    nll = scored.nll[model_config.n_loops]
    return row, [
        key | {"document": i, "bytes": int(size), "tokens": int(tokens), "nll": round(float(x), 3)}
        for i, (size, tokens, x) in enumerate(zip(scored.bytes, scored.tokens, nll, strict=True))
    ]


def _is_of(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in key.items())


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write our rows, and those another process has added meanwhile."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("arm", "budget", "max_lr", "seed", "document"))

    mine = {key(row) for row in rows}
    others = read_rows(out) if out.exists() else []
    write_rows(out, [row for row in others if key(row) not in mine] + rows)


def _finished(result: TrainResult) -> TrainResult:
    if not result.finished:
        raise KeyboardInterrupt
    return result


def summarise(
    rows: Iterable[dict[str, Any]], arms: Iterable[str], budget: str
) -> list[dict[str, Any]]:
    """A row an arm of `arms` that `rows` have for `budget`, at the learning rate tuned for it.

    The rate is that of the lowest loss. `loss` is the mean over the
    seeds at that rate, `spread` their range; `edge` says that the best rate was the lowest or the
    highest tried, so that the arm may reach less.
    """
    summary = []
    of_budget = [row for row in rows if row["budget"] == budget]
    for arm in arms:
        mine = [row for row in of_budget if row["arm"] == arm]
        if not mine:
            continue
        tried = sorted({row["max_lr"] for row in mine})
        rate = min(mine, key=lambda row: row["valid_loss"])["max_lr"]
        seeds = [row["valid_loss"] for row in mine if row["max_lr"] == rate]
        (first, *_) = (row for row in mine if row["max_lr"] == rate)
        summary.append(
            {
                "arm": arm,
                "parameters": first["parameters"],
                "updates": first["updates"],
                "max_lr": rate,
                "rates": len(tried),
                "edge": len(tried) > 1 and rate in (tried[0], tried[-1]),
                "seeds": len(seeds),
                "loss": sum(seeds) / len(seeds),
                "spread": max(seeds) - min(seeds),
                "cpu_seconds": first["cpu_seconds"],
                "exit_losses": exit_losses(first),
            }
        )
    return summary


def exit_losses(row: dict[str, Any]) -> dict[int, float]:
    """The loss of every exit of a row of `search`."""
    pairs = (text.split(":") for text in str(row["exit_losses"]).split())
    return {int(loop): float(loss) for loop, loss in pairs}
