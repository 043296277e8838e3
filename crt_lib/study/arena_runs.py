"""What runs an arena by its rules: tuning, the time of an update, and the runs, seed by seed."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from crt_lib.bench.table import rows_of
from crt_lib.bench.tokens import bench_tokens
from crt_lib.bench.trial import Training, random_batch, take_turns
from crt_lib.files import InputError, sha256, write_rows, write_text
from crt_lib.runs.machine import measured_on
from crt_lib.study.arenas import OURS, SEEDS, Arena, find_arena, in_time_of
from crt_lib.study.search import add_rows, documents_file, search
from crt_lib.study.trial import Row, Trial

PACE, TOKENS = "pace.csv", "tokens.csv"
TURNS = 40  # measured updates of an arm


def run_arena(
    name: str,
    folder: Path,
    *,
    jobs: int = 1,
    new_rules: bool = False,
    only: Sequence[str] = (),
    echo: Callable[[str], None] = print,
) -> list[Row]:
    """Tune every arm of an arena and run it with every seed; the rows of `folder`/`name`/runs.csv.

    What is there is not made again, and a training that was stopped goes on. `only`: these arms.
    The rules are `folder`/rules.md: raises InputError when they are not what they were when the
    arena's runs began (unless `new_rules`), for an unknown arena or arm, and as `search`.
    """
    arena, own = find_arena(name), folder / name
    for arm in only:
        if arm not in arena.arms:
            raise InputError(f"unknown arm {arm!r} of {name}; choose from {', '.join(arena.arms)}")
    keep_rules(folder, name, new_rules)
    if arena.again and (pace := rows_of(folder / arena.again / PACE)):
        write_rows(own / PACE, pace)
    if arena.timed and not rows_of(own / PACE):
        echo(f"measuring an update of {OURS} and others, {TURNS} in turn")
        write_rows(own / PACE, measure_pace(arena))
    how: dict[str, Any] = {"jobs": jobs, "threads": 1, "echo": echo, "keep": own / "checkpoints"}
    arms = [arm for arm in arena.arms if not only or arm in only]
    tries = [t for arm in arms for t in arena.tuning()[arm]]
    if arena.again:
        _adopt(folder / arena.again / "runs.csv", own / "tuning.csv", tries)
    search(tries, own / "tuning.csv", **how)
    runs = all_runs(own, arena, arms)
    # seed by seed, so that what is there first can be compared
    ordered = [trials[i] for i in range(len(SEEDS)) for trials in runs.values()]
    if arena.again:
        made = folder / arena.again / "runs.csv"
        _adopt(made, own / "runs.csv", ordered)
        _adopt(documents_file(made), documents_file(own / "runs.csv"), ordered)
    rows = search(ordered, own / "runs.csv", documents=arena.documents, **how)
    if arena.shapes and not only and not rows_of(own / TOKENS):
        echo("measuring how long each arm takes to write a token")
        shaped = {arm: arena.shaped(arm, best_try(own, arena, arm)).model for arm in arms}
        write_rows(own / TOKENS, bench_tokens(shaped))
    return rows


def _adopt(table: Path, own: Path, trials: Sequence[Trial]) -> None:
    """Add to `own` the rows of `trials` that it lacks and `table`, another arena's, has."""
    have = rows_of(own)
    missing = [trial.key.items() for trial in trials if not trial.row(have)]
    add_rows(own, [row for row in rows_of(table) if any(key <= row.items() for key in missing)])


def measure_pace(arena: Arena) -> list[Row]:
    """Seconds of an update on one thread: a row for OURS and each of `timed`, TURNS taken in turn.

    The machine should have nothing else to do.
    """
    arms = {arm: p for arm, p in arena.arms.items() if arm in (OURS, *arena.timed)}
    sides = {arm: (Training, p.model, p.train) for arm, p in arms.items()}
    batches = {arm: partial(random_batch, p.model, p.train) for arm, p in arms.items()}
    found = take_turns(sides, batches, steps=TURNS, threads=1)
    rows = []
    for arm, trial in found.items():
        seconds = sorted(sum(parts.values()) for parts in trial.updates)
        spread = {"low": seconds[0], "median": median(seconds), "high": seconds[-1]}
        rows.append({"arm": arm, "updates": len(seconds), **spread, **measured_on()})
    return rows


def all_runs(own: Path, arena: Arena, arms: Sequence[str]) -> dict[str, list[Trial]]:
    """The runs of `arms` with their best tries, and those of OURS in their time.

    Raises InputError as `best_try`.
    """
    runs = arena.runs({arm: best_try(own, arena, arm) for arm in arms})
    if arena.timed and OURS in arms:
        seconds = {row["arm"]: row["median"] for row in rows_of(own / PACE)}
        timed = arena.in_time(best_try(own, arena, OURS), seconds)
        runs |= {name: of for name, of in timed.items() if name in map(in_time_of, arms)}
    return runs


def keep_rules(folder: Path, name: str, new_rules: bool = False) -> None:
    """Note the rules that an arena's runs begin under; raises InputError when they were others.

    They are what rules.md says of all arenas, and its section on this one. rules.sha256 has a line
    for each version that runs were made under.
    """
    rules, note = folder / "rules.md", folder / name / "rules.sha256"
    if not rules.is_file():
        raise InputError(f"no {rules}; an arena runs by the rules that are written there")
    general, *sections = rules.read_text(encoding="utf-8").split("\n## ")
    of_arena = [section for section in sections if section.split()[:1] == [name]]
    if not of_arena:
        raise InputError(f"{rules} has no section {name!r}; write its rules before its runs")
    now = sha256("\n## ".join([general, *of_arena]).encode())
    before = note.read_text().splitlines() if note.is_file() else []
    begun = before or any((folder / name / table).exists() for table in ("tuning.csv", "runs.csv"))
    if begun and before[-1:] != [now] and not new_rules:
        raise InputError(
            f"{rules} does not say of {name} what it said when its runs began; restore it and "
            f"{note.name}, or write there why it changed and give --new-rules"
        )
    if before[-1:] != [now]:
        write_text(note, "\n".join([*before, now]) + "\n")


def best_try(own: Path, arena: Arena, arm: str) -> str:
    """The try of an arm with the lowest loss on all of valid; raises InputError before all ran."""
    found = _tried(own, arena, arm)
    if len(found) < len(arena.tries):
        raise InputError(f"{arm} has {len(found)} of its {len(arena.tries)} tries; run the arena")
    return min(found, key=found.__getitem__)


def _tried(own: Path, arena: Arena, arm: str) -> dict[str, float]:
    """The loss on valid of each try of an arm that has run."""
    rows = rows_of(own / "tuning.csv")
    return {
        name: row["valid_loss"]
        for name, trial in zip(arena.tries, arena.tuning()[arm], strict=True)
        if (row := trial.row(rows))
    }


def ran(name: str, folder: Path) -> dict[str, list[tuple[Trial, Row]]]:
    """The runs of each arm of an arena that are in `folder`/`name`/runs.csv, with their rows.

    Without those that broke, those of an arm as it was before, and arms that are not tuned yet.
    """
    arena, own = find_arena(name), folder / name
    rows = rows_of(own / "runs.csv")
    begun = [arm for arm in arena.arms if any(row["arm"] == arm for row in rows)]
    tuned = [arm for arm in begun if len(_tried(own, arena, arm)) == len(arena.tries)]
    found: dict[str, list[tuple[Trial, Row]]] = {}
    for arm, trials in all_runs(own, arena, tuned).items():
        for trial in trials:
            row = trial.row(rows)
            if row and row["valid_loss"] < math.inf:
                found.setdefault(arm, []).append((trial, row))
    return found
