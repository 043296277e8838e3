"""Many short trainings compared on valid: equal tokens or equal time, several at once."""

import concurrent.futures
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crt_lib.bench.table import put_rows, rows_of
from crt_lib.files import InputError, locked, stop_signals
from crt_lib.runs.machine import end_with_parent
from crt_lib.runs.profiles import Profile
from crt_lib.study.trial import Row, Trial, run_trial

NEVER = 1 << 30
POLL = 0.2  # seconds between looks for a signal
GRACE = 20.0  # seconds that a worker has to save its training


def grid(
    arms: Mapping[str, Profile],
    rates: Sequence[float],
    seeds: Sequence[int] = (0,),
    updates: int | None = None,
    minutes: float | None = None,
) -> list[Trial]:
    """Every arm with every learning rate and seed, for `updates` or `minutes`.

    With neither, for the arm's own updates; raises InputError with both, or without a rate.
    """
    if not rates:
        raise InputError("no learning rate; give one or more, since arms differ in their best")
    if updates is not None and minutes is not None:
        raise InputError("give updates (equal tokens) or minutes (equal time), not both")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"minutes is {minutes}; it must be positive, and end")
    trials = []
    for seed, (name, profile), rate in itertools.product(seeds, arms.items(), rates):
        changes = {"max_lr": rate, "seed": seed, "eval_every": 0, "checkpoint_every": NEVER}
        changes |= {} if updates is None else {"updates": updates}
        trained = profile.replace(train=profile.train.replace(**changes))
        trials.append(Trial(name, trained, minutes))
    return trials


def search(
    trials: Sequence[Trial],
    out: str | Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    documents: bool = False,
    keep: Path | None = None,
    echo: Callable[[str], None] = print,
) -> list[Row]:
    """Run the trials, `jobs` at a time, and add a row of each to `out`, a CSV file; its rows.

    A job has `threads` threads; None: an equal share of the processors, but one for a trial of
    `minutes`: those are of processor time, and the updates that fit into them are fixed before the
    run, from the arm's pace. A row has the parameters, tokens, seconds and, by exit, the loss in
    nats on the first `eval_tokens` of valid (arms must share a tokenizer). `valid_loss` is the last
    exit's, for a model that sees the future its deployable loss, and infinite where the training
    broke. With `documents`, test is scored too, the last exit's nats by document going to
    `documents_file(out)`. Trials whose rows are there are not run again. `keep`: the trainings
    stay in folders there, and go on where they were stopped. Raises InputError for no jobs, and for
    `out` a folder.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{str(out)!r} is a folder; give the name of a CSV file")
    with locked(out):  # or an error, before the first training
        done, scored = rows_of(out), rows_of(documents_file(out))

    def waits(trial: Trial) -> bool:
        row = trial.row(done)
        lacks = documents and not trial.row(scored)
        return row is None or (lacks and row["valid_loss"] < math.inf)  # what broke is not scored

    waiting = [trial for trial in trials if waits(trial)]
    share = max(1, (os.cpu_count() or 1) // jobs)
    calls = [(t, threads or (1 if t.minutes else share), documents, keep) for t in waiting]
    bar = {"unit": "training", "leave": False, "disable": None}
    for row, by_document in tqdm(_in_workers(calls, jobs), total=len(calls), **bar):
        add_rows(documents_file(out), by_document)
        add_rows(out, [row])
        with tqdm.external_write_mode():
            echo(
                f"{row['arm']} lr {row['max_lr']:g} seed {row['seed']}: loss "
                f"{row['valid_loss']:.3f}, {row['updates']} updates in {row['seconds']:.0f} s"
            )
    return rows_of(out)


def _in_workers(calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[Row, list[Row]]]:
    """What `run_trial` returns for each of `calls`, `jobs` at a time, as they end.

    Raises KeyboardInterrupt when a signal has stopped it. A worker is told by SIGTERM, so that its
    training is saved, and hears no Ctrl-C, at which it would say where it was.
    """
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with stop_signals() as stopped:
        with concurrent.futures.ProcessPoolExecutor(jobs, context, end_with_parent) as pool:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it
            try:
                running = {pool.submit(run_trial, *call) for call in calls}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            workers = [one for one in multiprocessing.active_children() if one not in others]
            try:
                while running:
                    ended, running = concurrent.futures.wait(running, POLL, FIRST_COMPLETED)
                    yield from (future.result() for future in ended)
                    if stopped.is_set():
                        raise KeyboardInterrupt
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                _end(workers)
                raise
        if stopped.is_set():  # while the last worker was ending
            raise KeyboardInterrupt


def _end(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()
    end = time.monotonic() + GRACE
    for worker in workers:
        worker.join(max(0, end - time.monotonic()))
        worker.kill()


def tune(
    arms: Mapping[str, Profile],
    out: str | Path,
    rates: Sequence[float],
    seeds: Sequence[int] = (0,),
    *,
    updates: int | None = None,
    minutes: float | None = None,
    **how: Any,
) -> list[Row]:
    """`search` with the first seed from `rates`, and the others at the best rate of each arm.

    An arm's rates are halved or doubled until its best has a worse one on either side. `how` goes
    to `search`. Returns the rows of `out`.
    """
    waiting = grid(arms, rates, seeds[:1], updates, minutes)
    tried, best = list(waiting), {}
    while waiting:
        rows = search(waiting, out, **how)
        waiting = []
        for name, profile in arms.items():
            found = [row for trial in tried if trial.arm == name and (row := trial.row(rows))]
            losses = {row["max_lr"]: row["valid_loss"] for row in found}
            best[name] = rate = min(losses, key=losses.__getitem__)
            beyond = [rate / 2] * (rate == min(losses)) + [rate * 2] * (rate == max(losses))
            if beyond:
                waiting += grid({name: profile}, beyond, seeds[:1], updates, minutes)
        tried += waiting
    others = []
    for name, rate in best.items():
        others += grid({name: arms[name]}, [rate], seeds[1:], updates, minutes)
    return search(others, out, **how)


def documents_file(out: str | Path) -> Path:
    """The table beside `out` with a row for each trial and document of test."""
    return Path(out).with_name(f"{Path(out).stem}_documents.csv")


def add_rows(path: Path, rows: list[Row]) -> None:
    """Add `rows` to the table, in place of those of the same trials of an arm as it was before."""
    if rows:
        key = [name for name in ("arm", "budget", "max_lr", "seed", "document") if name in rows[0]]
        with locked(path):
            put_rows(path, rows, key)


def summarise(rows: Sequence[Mapping[str, Any]], arms: Iterable[str], budget: str) -> list[Row]:
    """A row an arm of `arms` that `rows` have for `budget`, at the learning rate tuned for it.

    The rate is that of the lowest loss with the lowest seed. `loss` and `exit_losses` are means
    over the seeds at that rate, `losses` are those of each, `low` and `high` the range; `edge` says
    that no lower or no higher rate was tried, so that the arm may reach less.
    """
    summary = []
    for arm in arms:
        mine = [row for row in rows if (row["arm"], row["budget"]) == (arm, budget)]
        if not mine:
            continue
        seed = min(row["seed"] for row in mine)
        tuned = {row["max_lr"]: row for row in mine if row["seed"] == seed}
        rate = min(tuned, key=lambda rate: tuned[rate]["valid_loss"])
        best = [row for row in mine if row["max_lr"] == rate]
        losses = {row["seed"]: row["valid_loss"] for row in best}
        exits = [found for found in map(exit_losses, best) if found] or [{}]
        names = ("arm", "parameters", "updates", "max_lr", "cpu_seconds")
        summary.append(
            {name: tuned[rate][name] for name in names}
            | {"rates": len(tuned), "edge": rate in (min(tuned), max(tuned)), "seeds": len(losses)}
            | {"loss": statistics.fmean(losses.values()), "losses": losses}
            | {"low": min(losses.values()), "high": max(losses.values())}
            | {"exit_losses": {loop: statistics.fmean(e[loop] for e in exits) for loop in exits[0]}}
        )
    return summary


def steps(summary: Sequence[Row]) -> dict[str, float]:
    """How far each arm of a ladder is below the one before it; rows of `summarise`."""
    return {
        after["arm"].removeprefix("+ "): before["loss"] - after["loss"]
        for before, after in itertools.pairwise(summary)
    }


def exit_losses(row: Mapping[str, Any]) -> dict[int, float]:
    """The loss of every exit of a row of `search`."""
    pairs = (text.split(":") for text in str(row["exit_losses"] or "").split())
    return {int(loop): float(loss) for loop, loss in pairs}
