"""Many short trainings compared on valid: equal tokens or equal time, several at once."""

import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crt_lib.audit.accounting import count_parameters
from crt_lib.audit.compare import document_of_tokens, score_documents
from crt_lib.audit.protocols import evaluate_deployable
from crt_lib.checkpoint import read_timing
from crt_lib.files import InputError, locked, read_rows, sha256, write_rows
from crt_lib.runs.machine import end_with_parent
from crt_lib.runs.profiles import Profile
from crt_lib.runs.trained import load_data
from crt_lib.train import TrainingError, TrainResult, train

WARM_UP, TIMED = 3, 20  # updates that measure an arm's speed
NEVER = 1 << 30
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training: an arm's name, and the profile with its learning rate, seed and updates."""

    arm: str
    profile: Profile
    minutes: float | None = None  # of processor time, instead of the updates

    @property
    def key(self) -> Row:
        """What tells its rows from those of other trials."""
        config = self.profile.train
        return {
            "arm": self.arm,
            "budget": f"{self.minutes:g} min" if self.minutes else f"{config.updates} updates",
            "max_lr": config.max_lr,
            "seed": config.seed,
            "settings": self.settings,
        }

    @property
    def settings(self) -> str:
        """A fingerprint of everything that is trained: rows of an arm that was changed differ.

        Not of the precision, which is the machine's: the stored rows were trained in bf16.
        """
        train = self.profile.train.replace(precision="bf16")
        of = self.profile
        settings = [of.model.to_dict(), train.to_dict(), of.corpus, of.tokenizer]
        return "s" + sha256(json.dumps(settings, sort_keys=True).encode())[:11]  # never a number

    def is_in(self, rows: Iterable[Row]) -> bool:
        """Whether one of `rows` is of it."""
        return any(self._made(row) for row in rows)

    def loss(self, rows: Iterable[Row]) -> float:
        """The loss of the row that is of it."""
        return next(row["valid_loss"] for row in rows if self._made(row))

    def _made(self, row: Row) -> bool:
        return all(row.get(name) == value for name, value in self.key.items())


def grid(
    arms: dict[str, Profile],
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
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes is {minutes}; it must be positive")
    trials = []
    for seed in seeds:
        for name, profile in arms.items():
            for rate in rates:
                changes = {"max_lr": rate, "seed": seed, "eval_every": 0, "checkpoint_every": NEVER}
                if updates is not None:
                    changes["updates"] = updates
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
    echo: Callable[[str], None] = print,
) -> list[Row]:
    """Run the trials, `jobs` at a time, and add a row of each to `out`, a CSV file; its rows.

    A job has `threads` threads; None: an equal share of the processors, but one for a trial of
    `minutes`: those are of processor time, which work elsewhere on the machine hardly changes. The
    updates that fit into them are fixed before the run, from the arm's pace, so that the learning
    rate ends where it should. A row has the parameters, tokens, seconds and, by exit, the loss in
    nats on the first `eval_tokens` of valid (arms must share a tokenizer). `valid_loss` is the last
    exit's, for a model that sees the future its deployable loss, and infinite where the training
    broke. With `documents`, test is scored too, the last exit's nats by document going to
    `documents_file(out)`. Trials whose rows are there are not run again.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    out = Path(out)
    done = _read(out)
    scored = _read(documents_file(out))
    waiting = [t for t in trials if not t.is_in(done) or (documents and not t.is_in(scored))]
    share = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, end_with_parent) as pool:
        running = [
            pool.submit(run_trial, t, threads or (1 if t.minutes else share), documents)
            for t in waiting
        ]
        try:
            for future in concurrent.futures.as_completed(running):
                row, by_document = future.result()
                _add(documents_file(out), by_document)
                _add(out, [row])
                echo(
                    f"{row['arm']} lr {row['max_lr']:g} seed {row['seed']}: loss "
                    f"{row['valid_loss']:.3f}, {row['updates']} updates in {row['seconds']:.0f} s"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _read(out)


def tune(
    arms: dict[str, Profile],
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

    def trials(name: str, at: Sequence[float], of: Sequence[int]) -> list[Trial]:
        return grid({name: arms[name]}, at, of, updates, minutes)

    tried = {name: trials(name, rates, seeds[:1]) for name in arms}
    waiting = [trial for mine in tried.values() for trial in mine]
    while waiting:
        rows = search(waiting, out, **how)
        waiting, best = [], {}
        for name, mine in tried.items():
            losses = {t.profile.train.max_lr: t.loss(rows) for t in mine}
            lowest, rate, highest = min(losses), min(losses, key=losses.__getitem__), max(losses)
            beyond = [rate / 2] * (rate == lowest) + [rate * 2] * (rate == highest)
            more = trials(name, beyond, seeds[:1]) if beyond else []
            best[name] = rate
            mine += more
            waiting += more
    others = [trial for name, rate in best.items() for trial in trials(name, [rate], seeds[1:])]
    return search(others, out, **how)


def documents_file(out: str | Path) -> Path:
    """The table beside `out` with a row for each trial and document of test."""
    return Path(out).with_name(f"{Path(out).stem}_documents.csv")


def run_trial(trial: Trial, threads: int, documents: bool) -> tuple[Row, list[Row]]:
    """One trial, in this process; its row and, if asked for, those of test's documents."""
    torch.set_num_threads(threads)
    data = load_data(trial.profile)
    model_config = trial.profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    config = trial.profile.train
    if documents:
        document_of_tokens(data, "test")  # or an error, before the training
    with tempfile.TemporaryDirectory() as folder:

        def run(**changes: Any) -> tuple[TrainResult, float]:
            begun = time.process_time()
            settings = config.replace(**changes)
            result = train(model_config, settings, data, folder, resume=False, progress=False)
            if not result.finished:
                raise KeyboardInterrupt
            return result, time.process_time() - begun

        try:
            if trial.minutes is not None:
                run(updates=1, eval_tokens=256)  # what only the first run of a process does
                _, first = run(updates=WARM_UP, eval_tokens=256)
                _, both = run(updates=WARM_UP + TIMED, eval_tokens=256)
                pace = max(both - first, both / 2) / TIMED
                config = config.replace(updates=max(1, round(60 * trial.minutes / pace)))
            result, processor = run()
        except TrainingError:
            return trial.key | _row(0, config.updates, 0, threads, 0.0, 0.0, {}, math.inf), []
        seconds = read_timing(Path(folder))[-1]["seconds"]
    last = result.metrics[-1]
    losses = {loop: last[f"valid_loss_{loop}"] for loop in model_config.head_loops}
    final = model_config.n_loops
    loss = losses[final]
    if not getattr(model_config, "causal", True):
        ids, eot = data.valid.ids, data.tokenizer.eot_id
        loss = evaluate_deployable(result.model, ids, eot, seq_len=64).loss[final]
    parameters = count_parameters(result.model)
    row = trial.key | _row(
        parameters, config.updates, last["tokens"], threads, seconds, processor, losses, loss
    )
    if not documents:
        return row, []
    scored = score_documents(result.model, data, "test", config.seq_len)
    return row, [
        trial.key
        | {"document": i, "bytes": int(size), "tokens": int(tokens), "nll": round(float(nll), 3)}
        for i, (size, tokens, nll) in enumerate(
            zip(scored.bytes, scored.tokens, scored.nll[final], strict=True)
        )
    ]


def _row(
    parameters: int,
    updates: int | None,
    tokens: int,
    threads: int,
    seconds: float,
    cpu_seconds: float,
    losses: dict[int, float],
    loss: float,
) -> Row:
    return {
        "parameters": parameters,
        "updates": updates,
        "tokens": tokens,
        "threads": threads,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "valid_loss": loss,
        "exit_losses": " ".join(f"{loop}:{loss:.4f}" for loop, loss in losses.items()),
    }


def _read(path: Path) -> list[Row]:
    return read_rows(path) if path.exists() else []


def _add(path: Path, rows: list[Row]) -> None:
    """Add `rows` to the table, in place of those of the same trials of an arm as it was before."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("arm", "budget", "max_lr", "seed", "document"))

    if not rows:
        return
    new = {key(row) for row in rows}
    with locked(path):
        write_rows(path, [row for row in _read(path) if key(row) not in new] + rows)


def summarise(rows: Iterable[Row], arms: Iterable[str], budget: str) -> list[Row]:
    """A row an arm of `arms` that `rows` have for `budget`, at the learning rate tuned for it.

    The rate is that of the lowest loss with the lowest seed. `loss` is the mean over the seeds at
    that rate, `low` and `high` their range; `edge` says that no lower or no higher rate was tried,
    so that the arm may reach less.
    """
    summary = []
    of_budget = [row for row in rows if row["budget"] == budget]
    for arm in arms:
        mine = [row for row in of_budget if row["arm"] == arm]
        if not mine:
            continue
        seed = min(row["seed"] for row in mine)
        tuned = {row["max_lr"]: row for row in mine if row["seed"] == seed}
        first = min(tuned.values(), key=lambda row: row["valid_loss"])
        rate = first["max_lr"]
        losses = [row["valid_loss"] for row in mine if row["max_lr"] == rate]
        summary.append(
            {
                "arm": arm,
                "parameters": first["parameters"],
                "updates": first["updates"],
                "max_lr": rate,
                "rates": len(tuned),
                "edge": rate in (min(tuned), max(tuned)),
                "seeds": len(losses),
                "loss": sum(losses) / len(losses),
                "low": min(losses),
                "high": max(losses),
                "cpu_seconds": first["cpu_seconds"],
                "exit_losses": exit_losses(first),
            }
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
