"""Disks that are full or read-only."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import kills
from base import Base
from harness import Case, Child, Kind, Lost, command, contents, one_line, same, small_disk

from crt_lib.checkpoint import load_model

ELSEWHERE = ("train", "export")  # tried with disks of many sizes
LONG = ("search", "reproduce")  # minutes each


def kinds(base: Base) -> Iterator[Kind]:
    """The kinds of this module."""
    refused = "one line that says so; what was there stays; with space the same files as ever"
    yield Kind("full disk: `crt train`", refused, full_disks(base, "train", range(40, 1500, 110)))
    yield Kind("full disk: `crt export`", refused, full_disks(base, "export", range(40, 330, 40)))
    yield Kind(
        "full disk: `crt explore --html`",
        refused,
        full_disks(base, "explore", range(1300, 3600, 330)),
    )
    ends = "one line that says so; what was there stays, no temporary file; with space it ends well"
    yield Kind("full disk: ten other commands", ends, no_space(base))
    yield Kind("read-only folder", "one line on stderr, nothing written", read_only(base))


def _words(base: Base, name: str, folder: Path) -> list[str]:
    if name == "train":
        return base.train(folder / "run")
    if name == "export":
        return ["export", str(base.run), str(folder / "hf")]
    return kills.explore(folder)


def full_disks(base: Base, name: str, sizes: range) -> Iterator[Case]:
    """A disk of so many kilobytes, as small as that some write fails."""
    whole: dict[str, str] = {}

    def case(size: int, folder: Path) -> None:
        disk = folder / "disk"
        with small_disk(disk, f"{size}k") as remount:
            if name == "explore":
                try:
                    shutil.copytree(base.run, disk / "run")
                except shutil.Error:
                    return
            done = Child(command(*_words(base, name, disk)), folder).wait()
            if done.status:
                one_line(done, 1, 2)
            for path in disk.glob("run/checkpoints/*.safetensors"):
                if path.stem != "gate":
                    load_model(path)
            stray = [str(p.relative_to(disk)) for p in disk.rglob("*") if ".tmp" in p.name]
            if stray:
                raise Lost(f"{size} kB: {', '.join(stray)} is left")
            remount("size=20m")
            done = Child(command(*_words(base, name, disk)), folder).wait()
            assert done.status == 0, f"{size} kB, then more: {done.err[-300:]}"
            found = contents(disk)
            if found != whole:
                raise Lost(f"{size} kB, then more: other files than undisturbed")

    def reference(folder: Path) -> None:
        if name == "explore":
            shutil.copytree(base.run, folder / "run")
        done = Child(command(*_words(base, name, folder)), folder).wait()
        assert done.status == 0, done.err[-300:]
        whole.update(contents(folder))

    if os.geteuid():
        return
    yield Case("undisturbed", reference, faults=0)
    for size in sizes:
        yield Case(f"{size} kB", partial(case, size))


def writers(base: Base) -> dict[str, Callable[[Path], list[str]]]:
    """The words of every command that writes, on a disk with a run, `books` and `results`."""
    search = ("search", "crt2", "--lr", "1e-3", "--updates", "1", "--out")
    calls: dict[str, Callable[[Path], list[str]]] = {
        "train": lambda d: base.train(d / "new"),
        "export": lambda d: ["export", str(base.run), str(d / "hf")],
        "export .pt2": lambda d: ["export", str(base.run), str(d / "x.pt2")],
        "explore": lambda d: kills.explore(d),
        "gate": lambda d: ["gate", str(d / "run")],
        "calibrate": lambda d: ["calibrate", str(d / "run")],
        "average": lambda d: ["average", str(d / "run"), "--last", "2"],
        "evaluate": lambda d: ["evaluate", str(base.run), "--out", str(d / "x.csv")],
        "lm-task": lambda d: ["lm-task", str(d / "task"), "--corpus", "grammar"],
        "search": lambda d: [*search, str(d / "s.csv")],
        "audit": lambda d: ["audit", str(base.run), "--html", str(d / "x.html")],
        "claims": lambda d: ["claims", "--results", str(d / "results")],
        "sweep": lambda d: [
            *("sweep", "01", "--grid", "seed=0", "--profile", "smoke"),
            *("--notebooks", str(d / "books"), "--out", str(d / "out")),
        ],
        "reproduce": lambda d: ["reproduce", *kills.SMOKE, "--only", "03", "--out", str(d / "out")],
    }
    return calls


def _furnish(base: Base, disk: Path) -> None:
    """What `writers` need."""
    shutil.copytree(base.run, disk / "run")
    kills.notebook(disk)
    kills.of_results(disk)


def no_space(base: Base) -> Iterator[Case]:
    """Every command that writes, with so many kilobytes left; then with space."""

    def case(words: list[str], left: int, folder: Path) -> None:
        disk = folder / "disk"
        with small_disk(disk, "60m"):
            _furnish(base, disk)
            before, filler = contents(disk), disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            os.truncate(filler, filler.stat().st_size - 1024 * left)
            done = Child(command(*words), folder).wait()
            if done.status:
                one_line(done, 1, 2)
                found = contents(disk)
                gone = [name for name in before if found.get(name) != before[name]]
                stray = [name for name in found if ".tmp" in name]
                if gone or stray:
                    raise Lost(f"changed or left: {', '.join(gone + stray)}")
            filler.unlink()
            done = Child(command(*words), folder).wait()
            assert done.status == 0, f"then with space: {done.err[-300:]}"

    if os.geteuid():
        return
    for name, words in writers(base).items():
        if name not in (*ELSEWHERE, *LONG):
            for left in (0, 8):
                yield Case(
                    f"{name}, {left} kB", lambda f, w=words, n=left: case(w(f / "disk"), n, f)
                )


def read_only(base: Base) -> Iterator[Case]:
    """Every command that writes, on a disk that is mounted read-only."""

    def case(words: Callable[[Path], list[str]], folder: Path) -> None:
        disk = folder / "disk"
        with small_disk(disk, "60m") as remount:
            _furnish(base, disk)
            before = contents(disk)
            remount("ro")
            one_line(Child(command(*words(disk)), folder).wait(), 1, 2)
            same(disk, before)

    if os.geteuid():
        return
    for name, words in writers(base).items():
        yield Case(name, partial(case, words))
