"""Try every kind of fault, and write what came of it to README.md beside this file."""

import argparse
import datetime
import importlib
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
NEEDED = (  # before a fork, so that a fault falls into the work and not into the imports
    *("crt_lib.cli", "crt_lib.runs.run", "crt_lib.hf.export", "crt_lib.hf.targets", "accelerate"),
    *("crt_lib.show.explorer_page", "crt_lib.study.arena_runs", "crt_lib.study.claims"),
    *("crt_lib.study.calibration", "crt_lib.book.sweep", "papermill", "transformers"),
)
SHARES = {"train": 40, "search": 8, "arena": 8, "sweep": 8, "reproduce": 8}
SHARES |= {"export": 8, "explore": 12, "claims": 8}


def kinds(kills: int, seed: int, scratch: Path):
    """Every kind of fault, in order."""
    import damage
    import foes
    import inputs
    import kills as killing

    base = damage.Base(scratch / "base")
    subjects = killing.subjects(base.run, base.corpus)
    for subject in subjects:
        share = max(1, round(kills * SHARES[subject.name.split()[0]] / 100))
        yield killing.sigkills(subject, share, seed, scratch)
    yield killing.stops(subjects[:5], seed, scratch)
    yield from damage.kinds(base, seed)
    yield from inputs.kinds(base)
    yield from foes.kinds(base)


def page(found, seconds: float, kills: int, seed: int) -> str:
    """The page, in Markdown."""
    rows = [
        f"| {kind.name} | {kind.tried} | {kind.survived} | {'no' if kind.lost else 'yes'} "
        f"| {kind.holds} |"
        for kind in found
    ]
    tried, survived = (sum(getattr(kind, name) for kind in found) for name in ("tried", "survived"))
    lost = sum(kind.lost for kind in found)
    failures = [f"- {text}" for kind in found for text in kind.failures]
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    threads = len(os.sched_getaffinity(0))
    lines = [
        "# Faults and foes",
        "",
        "Made by `make faults` from a run of it; do not edit.",
        f"{day}, {processor}, {threads} threads, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}: {seconds / 60:.0f} minutes, {kills} kills, seed {seed}.",
        "",
        "| fault | tried | survived | nothing lost | what must hold |",
        "|---|---:|---:|---|---|",
        *rows,
        f"| all | {tried} | {survived} | {'no' if lost else 'yes'} | |",
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
    asked.add_argument("--only", default="", help="kinds whose name this expression finds; no page")
    given = asked.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    begun, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        os.environ["CRT_CACHE_ROOT"] = str(scratch / "cache")
        for module in NEEDED:
            importlib.import_module(module)
        for kind in kinds(given.kills, given.seed, scratch):
            if not re.search(given.only, kind.name):
                continue
            kind.attempt(scratch / f"kind-{len(found)}")
            found.append(kind)
            print(
                f"{kind.seconds:6.0f} s  {kind.survived} of {kind.tried}  {kind.name}", flush=True
            )
    if not given.only:
        text = page(found, time.monotonic() - begun, given.kills, given.seed)
        (HERE / "README.md").write_text(text, encoding="utf-8")
    return int(any(kind.failures for kind in found))


if __name__ == "__main__":
    sys.exit(main())
