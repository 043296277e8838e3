"""Try every kind of fault, and write what came of it to README.md beside this file."""

import argparse
import datetime
import importlib
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crt_lib.bench.table import put_rows
from crt_lib.files import locked, read_rows, write_rows, write_text

HERE = Path(__file__).parent
FOUND = HERE / "found.csv"
FORK = multiprocessing.get_context("fork")
HOURS = 2.0  # of a soak
KILLS = 100  # SIGKILLs of a whole run, over all commands
NEEDED = (  # before a fork, so that a fault falls into the work and not into the imports
    *("crt_lib.cli", "crt_lib.runs.run", "crt_lib.hf.export", "crt_lib.hf.targets", "accelerate"),
    *("crt_lib.show.explorer_page", "crt_lib.study.arena_runs", "crt_lib.study.claims"),
    *("crt_lib.study.calibration", "crt_lib.book.sweep", "papermill", "transformers"),
    "torch._dynamo",  # by every optimizer's first step
)
WORKERS = 2  # kinds that are tried at once


def kinds(kills: int, seed: int, scratch: Path, soaked: float):
    """Every kind of fault, in order; the last are soaks, of `soaked` hours."""
    import ages
    import bombs
    import damage
    import disks
    import foes
    import inputs
    import kills as killing
    import limits
    import soak
    from base import Base

    base = Base(scratch / "base")
    subjects = killing.subjects(base.run, base.corpus)
    for subject in subjects:
        share = max(1, round(kills * subject.share / 100))
        yield killing.sigkills(subject, share, seed, base.whole)
        yield killing.stops(subject, seed, base.whole)
    yield from disks.kinds(base)
    yield from damage.kinds(base, seed)
    yield from limits.kinds(base)
    yield from ages.kinds(base)
    yield from inputs.kinds(base)
    yield from foes.kinds(base)
    yield from bombs.kinds(base)
    yield from soak.kinds(base, soaked, seed)


def row(kind, kills: int, seed: int) -> dict[str, object]:
    """What came of a kind, as a row of found.csv."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = re.search(r"^model name\s*: (.*)$", text, re.M)
    return {
        "fault": kind.name,
        "holds": kind.holds,
        "tried": kind.tried,
        "survived": kind.survived,
        "lost": kind.lost,
        "failures": " // ".join(" ".join(text.split())[:300] for text in kind.failures),
        "seconds": round(kind.seconds),
        "kills": kills,
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor[1] if processor else platform.machine()}, "
        f"{os.cpu_count()} threads, {platform.system()}, Python {platform.python_version()}",
    }


def page(rows: list[dict[str, Any]], not_run: list[str]) -> str:
    """The page, in Markdown, of the rows of found.csv, and of the kinds that have none."""
    table = [
        f"| {r['fault']} | {r['tried']}{_of_other_kills(r)} | {r['survived']} "
        f"| {'no' if r['lost'] else 'yes'} | {r['holds']} | {r['date']} |"
        for r in rows
    ]
    table += [f"| {name} | not run | | | | |" for name in not_run]
    tried, survived, lost = (sum(r[name] for r in rows) for name in ("tried", "survived", "lost"))
    seconds = sum(r["seconds"] for r in rows if not r["fault"].startswith("soak"))
    failures = [f"- {name}: not run" for name in not_run]
    failures += [f"- {one}" for r in rows for one in (r["failures"] or "").split(" // ") if one]
    lines = [
        "# Faults and foes",
        "",
        "Made by `make faults`; do not edit. Each row is of the last run of that fault.",
        "",
        *(f"- {machine}" for machine in dict.fromkeys(r["machine"] for r in rows)),
        f"- {seconds / 60:.0f} minutes of work, {WORKERS} kinds at a time; the soak apart",
        "",
        "| fault | tried | survived | nothing lost | what must hold | date |",
        "|---|---:|---:|---|---|---|",
        *table,
        f"| all | {tried} | {survived} | {'no' if lost else 'yes'} | | |",
        "",
        "Files are compared without what a clock wrote: seconds, dates, memory. A disk is filled, "
        "or made read-only, only where this may mount one.",
        "",
        "What did not survive:" if failures else "All survived.",
        *(["", *failures] if failures else []),
    ]
    return "\n".join(lines) + "\n"


def _of_other_kills(row: dict[str, Any]) -> str:
    """How many kills the run of a row was asked for, where they are its faults and not KILLS."""
    killed = row["fault"].startswith("SIGKILL") and row["kills"] != KILLS
    return f" (a run of {row['kills']} kills)" if killed else ""


def main() -> int:
    """0 if all was survived, and no kind has never been run."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--kills", type=int, default=KILLS, help="SIGKILLs, over all commands")
    asked.add_argument("--seed", type=int, default=0, help="of the moments and the places")
    asked.add_argument("--only", default="", help="kinds whose name this expression finds")
    asked.add_argument("--soak", type=float, default=0, help="hours of it, and nothing else")
    given = asked.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        os.environ["CRT_CACHE_ROOT"] = str(scratch / "cache")
        for module in NEEDED:
            importlib.import_module(module)
        every = [*kinds(given.kills, given.seed, scratch, given.soak or HOURS)]
        names = [kind.name for kind in every]

        def attempt(kind: Any) -> None:
            kind.attempt(scratch / kind.name.replace("/", " "))
            keep(row(kind, given.kills, given.seed), names)

        own = [kind for kind in every if kind.name.startswith("soak") == bool(given.soak)]
        whole = share_out([kind for kind in own if re.search(given.only, kind.name)], attempt)
    rows = {r["fault"]: r for r in read_rows(FOUND)}
    return int(not whole or any(name not in rows or rows[name]["failures"] for name in names))


def share_out(chosen: list[Any], attempt: Callable[[Any], None]) -> bool:
    """Try the kinds in WORKERS processes, longest first, then those that are to be alone.

    Whether each process came to its end.
    """
    took = {r["fault"]: r["seconds"] for r in read_rows(FOUND)} if FOUND.exists() else {}
    kinds = sorted(chosen, key=lambda kind: -took.get(kind.name, 0))
    ends = _tried([kind for kind in kinds if not kind.alone], attempt, WORKERS)
    return not any(ends + _tried([kind for kind in kinds if kind.alone], attempt, 1))


def _tried(kinds: list[Any], attempt: Callable[[Any], None], workers: int) -> list[int | None]:
    """How the processes ended that have tried the kinds, each the next one."""
    turn = FORK.Value("i", 0)

    def work() -> None:
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(kinds):
                return
            attempt(kinds[number])

    processes = [FORK.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def keep(found: dict[str, Any], known: list[str]) -> None:
    """Put a row into found.csv and write the page, which also says which of `known` has none."""
    with locked(FOUND):
        put_rows(FOUND, [found], ["fault"])
        rows = [row for row in read_rows(FOUND) if row["fault"] in known]  # not of kinds that went
        write_rows(FOUND, rows)
        not_run = [name for name in known if name not in {r["fault"] for r in rows}]
        write_text(HERE / "README.md", page(rows, not_run))


if __name__ == "__main__":
    sys.exit(main())
