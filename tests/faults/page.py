"""Try every kind of fault, and write what came of it to README.md beside this file."""

import argparse
import datetime
import importlib
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from crt_lib.bench.table import put_rows
from crt_lib.files import locked, read_rows, write_text

HERE = Path(__file__).parent
FOUND = HERE / "found.csv"
NEEDED = (  # before a fork, so that a fault falls into the work and not into the imports
    *("crt_lib.cli", "crt_lib.runs.run", "crt_lib.hf.export", "crt_lib.hf.targets", "accelerate"),
    *("crt_lib.show.explorer_page", "crt_lib.study.arena_runs", "crt_lib.study.claims"),
    *("crt_lib.study.calibration", "crt_lib.book.sweep", "papermill", "transformers"),
)


def kinds(kills: int, seed: int, scratch: Path, soaked: float):
    """Every kind of fault, in order; with hours of soaking, that alone."""
    import damage
    import foes
    import inputs
    import kills as killing
    import soak

    base = damage.Base(scratch / "base")
    if soaked:
        yield from soak.kinds(base, soaked, seed)
        return
    subjects = killing.subjects(base.run, base.corpus)
    for subject in subjects:
        share = max(1, round(kills * subject.share / 100))
        yield killing.sigkills(subject, share, seed, scratch)
    yield killing.stops(subjects, seed, scratch)
    yield from damage.kinds(base, seed)
    yield from inputs.kinds(base)
    yield from foes.kinds(base)


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


def page(rows: list[dict[str, Any]]) -> str:
    """The page, in Markdown, of the rows of found.csv."""
    table = [
        f"| {r['fault']} | {r['tried']} | {r['survived']} | {'no' if r['lost'] else 'yes'} "
        f"| {r['holds']} | {r['date']} |"
        for r in rows
    ]
    tried, survived, lost, seconds = (
        sum(r[name] for r in rows) for name in ("tried", "survived", "lost", "seconds")
    )
    failures = [f"- {one}" for r in rows for one in (r["failures"] or "").split(" // ") if one]
    lines = [
        "# Faults and foes",
        "",
        "Made by `make faults`; do not edit. Each row is of the last run of that fault.",
        "",
        *(f"- {machine}" for machine in dict.fromkeys(r["machine"] for r in rows)),
        f"- {seconds / 60:.0f} minutes in all",
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


def main() -> int:
    """0 if all was survived."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--kills", type=int, default=100, help="SIGKILLs, over all commands")
    asked.add_argument("--seed", type=int, default=0, help="of the moments and the places")
    asked.add_argument("--only", default="", help="kinds whose name this expression finds")
    asked.add_argument("--soak", type=float, default=0, help="hours of it, and nothing else")
    given = asked.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    found: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        os.environ["CRT_CACHE_ROOT"] = str(scratch / "cache")
        for module in NEEDED:
            importlib.import_module(module)
        for kind in kinds(given.kills, given.seed, scratch, given.soak):
            if not re.search(given.only, kind.name):
                continue
            kind.attempt(scratch / f"kind-{len(found)}")
            found.append(kind)
            with locked(FOUND):
                put_rows(FOUND, [row(kind, given.kills, given.seed)], ["fault"])
                write_text(HERE / "README.md", page(read_rows(FOUND)))
    return int(any(kind.failures for kind in found))


if __name__ == "__main__":
    sys.exit(main())
