"""`crt doctor`: what this machine is, and whether and how fast the two commands will work on it."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from crt_lib.bench.table import rows_of
from crt_lib.bench.trial import try_random
from crt_lib.device import choose_precision
from crt_lib.runs.machine import machine_memory
from crt_lib.runs.manifest import checkout_root, run_environment
from crt_lib.study.arenas import OURS, find_arena
from crt_lib.text.corpus import cache_root

NEEDS_PYTHON = (3, 11, 5)
NEEDS_MEMORY, NEEDS_DISK = 3e9, 4e9  # bytes: two notebooks at a time; .venv, caches, results
NEEDED = ("torch", "numpy", "tokenizers", "accelerate")  # by all that is done here
PACKAGES = {  # what is imported -> the command that installs it
    **dict.fromkeys(NEEDED, "pip install crt-lm"),
    "transformers": "pip install 'crt-lm[notebooks]'",
    "papermill": "pip install 'crt-lm[notebooks]'",
    "nbval": "pip install 'crt-lm[test]'",
    "jupyterlab": "pip install 'crt-lm[lab]'",
}
MEASURED = 3.0  # seconds of updates
TESTS = "tests.csv"  # the seconds of `make test`, and of an update in fp32, as most tests are
PACED_BY = "fresh"  # the arena whose `crt2` that update is of


class Finding(NamedTuple):
    """A line of the report; `broken`: the two commands will not work."""

    what: str
    found: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.what:<12} {self.found}" + (" [!]" if self.broken else "")


def examine() -> Iterator[Finding]:
    """Every finding, as it is made; the last is measured, for some seconds."""
    low = sys.version_info[:3] < NEEDS_PYTHON
    needed = f", {'.'.join(map(str, NEEDS_PYTHON))} or newer is needed" if low else ""
    yield Finding("python", f"{platform.python_version()}, {platform.platform()}{needed}", low)
    yield _packages()
    here, isa = run_environment(), torch.backends.cpu.get_cpu_capability()
    threads = f"{here['cpu_count']} cores, {here['torch_threads']} threads for torch"
    yield Finding("processor", f"{platform.machine()}, {isa}, {threads}")
    gpu = torch.cuda.is_available()
    chosen = choose_precision("auto", torch.device("cuda" if gpu else "cpu"), 256, "muon")
    yield Finding("precision", f"{chosen.name} for width 256 ({chosen.why})")
    size = machine_memory()
    memory = f"{size / 1e9:.1f} GB, {NEEDS_MEMORY / 1e9:.0f} needed"
    yield Finding("memory", memory, size < NEEDS_MEMORY)
    if gpu:
        size = torch.cuda.get_device_properties(0).total_memory
        yield Finding("GPU", f"{torch.cuda.get_device_name()}, {size / 1e9:.0f} GB")
    else:
        yield Finding("GPU", "none that torch sees; nothing here needs one")
    root = checkout_root()
    free = shutil.disk_usage(root).free
    yield Finding("disk", f"{free / 1e9:.0f} GB free at {root}", free < NEEDS_DISK)
    yield Finding("WikiText-2", _text())
    yield _commands(root)


def _packages() -> Finding:
    missing = [name for name in PACKAGES if not util.find_spec(name)]
    there = ", ".join(f"{n} {metadata.version(n)}" for n in PACKAGES if n not in missing)
    how = "; ".join(f"no {name}: {PACKAGES[name]}, or make setup" for name in missing)
    broken = any(name in NEEDED for name in missing)
    return Finding("packages", "; ".join(filter(None, (there, how))), broken)


def _text() -> str:
    if root := os.environ.get("CRT_DATA_ROOT"):
        there = (Path(root) / "wikitext-2").is_dir()
        state = "there" if there else "not there: unset CRT_DATA_ROOT, or put wikitext-2/ into it"
        return f"{root}: {state}"
    kept = (cache_root() / "wikitext").is_dir()
    state = "kept from an earlier download" if kept else "will be fetched from the hub"
    return f"{state}; the two commands need none"


def _commands(root: Path) -> Finding:
    if not (root / "Makefile").is_file():
        return Finding("commands", "no checkout here: crt works, make reproduce does not", True)
    if not shutil.which("make"):
        return Finding("commands", "no make: install it, or run the lines of the Makefile", True)
    results, here = root / "results", update_seconds("auto")
    notebooks = rows_of(results / "notebooks.csv", profile="quick")
    if not notebooks:
        return Finding(
            "commands", "no results/notebooks.csv here, so how long they take is unknown"
        )
    times = here / notebooks[0]["update_seconds"]
    seconds = times * max(row["ended"] for row in notebooks)
    tests = ""
    for row in rows_of(results / TESTS):
        minutes = update_seconds("fp32") / row["update_seconds"] * row["seconds"] / 60
        tests = f", make test: about {minutes:.0f}"
    return Finding(
        "commands",
        f"make reproduce: about {seconds / 60:.0f} minutes after its installation{tests}, as an "
        f"update takes {1000 * here:.0f} ms, {times:.1f} times what it took where notebooks were "
        "timed",
    )


def update_seconds(precision: Literal["auto", "fp32"]) -> float:
    """Seconds of an update of the arenas' `crt2` on one thread."""
    ours = find_arena(PACED_BY).arms[OURS]
    train = ours.train.replace(precision=precision)
    return try_random(ours.model, train, MEASURED, threads=1).update()
