"""Disks that are full or read-only, files that are damaged, and two processes in one folder."""

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import kills
from harness import (
    Case,
    Child,
    Kind,
    Lost,
    command,
    contents,
    crt,
    memory_group,
    one_line,
    same,
    small_disk,
)

from crt_lib.checkpoint import load_model
from crt_lib.files import sha256

LONG = 100_000_000  # bytes of a long line
SHORT = ("text/train.txt", "text/test.txt")  # not damaged in ways of which nothing can be told
SHARES = (25, 50, 75)  # percent of the memory that a training needs
LONG_WRITERS = (
    "search",
    "reproduce",
    "train",
    "export",
)  # minutes; others have disks of many sizes
MARGIN = 400_000_000  # bytes of address space beyond what the imports take


class Base:
    """A finished training with traces, a gate and calibrated exits, and the text that it is of."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.corpus, self.run, self.whole = folder / "text", folder / "run", folder / "whole"
        self.whole.mkdir()
        kills.text(self.corpus)
        self._must(folder, *kills.train_words(self.run, self.corpus))
        self.trained = contents(self.run)
        self.rich = folder / "rich" / "run"
        shutil.copytree(self.run, self.rich)
        self._must(folder, *kills.explore(self.rich.parent))
        self._must(folder, "calibrate", str(self.rich))
        best = self.rich / "checkpoints/best.safetensors"
        best.with_name(f"{best.name}.sha256").write_text(
            f"{sha256(best.read_bytes())}  {best.name}\n"
        )

    def _must(self, folder: Path, *words: str) -> None:
        done = crt(folder, *words)
        assert done.status == 0, f"{words[0]}: {done.err[-500:]}"

    def train(self, out: Path) -> list[str]:
        """The words of the training that `run` is of, in another folder."""
        return kills.train_words(out, self.corpus)

    def resumed(self, folder: Path) -> list[str]:
        """The words of a training in `folder`/run that goes on from `last`."""
        path = folder / "run/manifest.json"
        if path.is_file() and (text := path.read_bytes()).count(b'"done"'):
            path.write_bytes(text.replace(b'"done"', b'"stopped"'))
        return self.train(folder / "run")


def kinds(base: Base, seed: int) -> Iterator[Kind]:
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
    yield Kind("full disk: every command that writes", ends, no_space(base))
    yield Kind("read-only folder", "one line on stderr, nothing written", read_only(base))
    holds = "exit status 0 or one line that says so, no traceback; no other file is changed"
    yield Kind("damaged file", holds, damages(base, seed))
    yield Kind(
        "two processes in one folder", "one goes on; the other says why it does not", twins(base)
    )
    yield Kind("out of memory", "it goes on to the same files", memory(base))
    holds = "ended by the kernel in the middle of its work, it goes on to the same files"
    yield Kind("out of memory, in a control group", holds, group_memory(base))
    yield Kind(
        "NaN loss", "one line that names the update; every checkpoint can be read", nan(base)
    )


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
        if name not in LONG_WRITERS:
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


def _flip(position: float, data: bytes) -> bytes:
    at = min(len(data) - 1, int(position * len(data)))
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _ways(rng: random.Random, text: bool) -> dict[str, Callable[[Path], None]]:
    """Ways to damage a file, or a text."""

    def rewritten(change: Callable[[bytes], bytes], path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    long = LONG // 400 if text else LONG  # to score more takes minutes
    changes: dict[str, Callable[[bytes], bytes]] = {
        "0 bytes": lambda d: b"",
        "half of it": lambda d: d[: len(d) // 2],
        "without its last byte": lambda d: d[:-1],
        "not UTF-8": lambda d: d[: len(d) // 2] + b"\xff\xfe" + d[len(d) // 2 :],
        f"a line of {long / 1e6:g} MB": lambda d: b"x" * long + b"\n" + d,
        "nested deep": lambda d: b"[" * 200_000,
    }
    for place in (0.0, 0.002, 0.01, 0.1, 0.5, 0.97):
        position = min(0.9999, place + rng.random() * 0.01)
        changes[f"a bit at {position:.1%}"] = partial(_flip, position)
    found = {name: partial(rewritten, change) for name, change in changes.items()}
    return {**found, "a folder": folder, "a loop of links": loop}


def damages(base: Base, seed: int) -> Iterator[Case]:
    """Every file that a command reads, damaged in every way."""

    def generate(*more: str) -> Callable[[Path], list[str]]:
        return lambda folder: ["generate", str(folder / "run"), "the river", "--tokens", "4", *more]

    def trained(folder: Path) -> list[str]:
        where = ["--corpus", str(folder / "text"), "--tokenizer", "bpe:300"]
        where += ["--out", str(folder / "new"), "--set=train.updates=1"]
        return ["train", "--profile", "smoke", "--quiet", *where]

    def sweep(f: Path) -> list[str]:
        where = ["--notebooks", str(f / "books"), "--out", str(f / "out")]
        return ["sweep", "01", "--grid", "seed=x", "--profile", "smoke", *where]

    reads = {
        "run/checkpoints/best.safetensors": generate("--exit", "full"),
        "run/checkpoints/best.safetensors.sha256": generate("--exit", "full"),
        "run/checkpoints/tokenizer.json": generate("--exit", "full"),
        "run/checkpoints/gate.safetensors": generate("--exit", "gate", "--tau0", "0.5"),
        "run/checkpoints/exits.json": generate(),
        "run/checkpoints/last.safetensors": base.resumed,
        "run/manifest.json": base.resumed,
        "run/metrics.jsonl": base.resumed,
        "run/timing.jsonl": base.resumed,
        "run/config.json": base.resumed,
        "run/results.csv": lambda f: base.train(f / "run"),
        "run/traces/valid.safetensors": kills.explore,
        "run/policies.csv": kills.explore,
        "text/valid.txt": trained,
        "text/train.txt": trained,
        "text/test.txt": trained,
        "books/01_train.ipynb": sweep,
    }

    def case(name: str, damage: Callable[[Path], None], folder: Path) -> None:
        shutil.copytree(base.rich, folder / "run")
        shutil.copytree(base.corpus, folder / "text")
        kills.notebook(folder)
        damage(folder / name)
        words = reads[name](folder)
        before = {
            path: path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.stem != "manifest"
        }
        done = Child(command(*words), folder).wait()
        if done.status:
            one_line(done, 1, 2)
            gone = [str(p.relative_to(folder)) for p, was in before.items() if not _is(p, was)]
            if gone:
                raise Lost(f"changed, though refused: {', '.join(gone[:4])}")
        else:
            assert "Traceback" not in done.err
            if name.endswith("best.safetensors"):
                raise Lost("a damaged checkpoint was taken, though its checksum lay beside it")

    for name in reads:
        ways = _ways(random.Random(f"{seed} {name}"), text=name.startswith("text/"))
        for way, damage in ways.items():
            if name not in SHORT or way in ("0 bytes", "not UTF-8", "a folder", "a loop of links"):
                yield Case(f"{name}: {way}", partial(case, name, damage))


def _is(path: Path, was: bytes) -> bool:
    return path.name in (".stdout", ".stderr") or (path.is_file() and path.read_bytes() == was)


def twins(base: Base) -> Iterator[Case]:
    """A command begun twice at once in one folder."""
    for subject in kills.subjects(base.run, base.corpus):
        if subject.name.split()[0] in ("train", "sweep", "arena", "export", "explore", "search"):
            yield Case(subject.name, partial(_twin, subject, base.whole))


def _twin(subject: kills.Subject, kept: Path, folder: Path) -> None:
    whole, _ = kills.undisturbed(subject, kept)
    shared, other = folder / "shared", folder / "other"
    other.mkdir()
    shared.mkdir()
    subject.prepare(shared)
    first = subject.begin(shared)
    patch = subject.patch and partial(subject.patch, shared)
    second = Child(command(*subject.words(shared), patch=patch), other)
    ends = [first.wait(), second.wait()]
    for done in ends:
        assert "Traceback" not in done.err, f"a traceback: {done.err[-300:]}"
    assert 0 in [done.status for done in ends], f"neither went on: {ends[0].err[-200:]}"
    same(shared, whole, "two at once:")


def memory(base: Base) -> Iterator[Case]:
    """Too little address space for an update, or an end by the kernel in the middle of one."""

    def case(share: int, folder: Path) -> None:
        limit = address_space() + share * MARGIN // 100
        done = Child(command(*base.train(folder / "run")), folder, memory=limit).wait()
        if done.status:
            assert done.status in (1, 2, -signal.SIGKILL, -signal.SIGABRT), f"status {done.status}"
            done = crt(folder, *base.train(folder / "run"))
        assert done.status == 0, done.err[-300:]
        same(folder / "run", base.trained)

    for share in (1, 3, 6, 10):
        yield Case(f"{share * MARGIN // 100_000_000} MB", partial(case, share))


def group_memory(base: Base) -> Iterator[Case]:
    """Less memory than a training needs beyond what it shares with the process it is forked from.

    The kernel must have ended at least the one with the least. No cases where no group can be had.
    """
    try:
        with memory_group(2**30) as (_, peak):
            peak()
    except OSError:
        return

    def case(share: int, folder: Path) -> None:
        words = base.train(folder / "run")
        with memory_group() as (group, peak):
            assert Child(command(*words), folder, group=group).wait().status == 0
            needed = peak()
        shutil.rmtree(folder / "run")
        with memory_group(needed * share // 100) as (group, _):
            status = Child(command(*words), folder, group=group).wait().status
        assert status == -signal.SIGKILL or (status == 0 and share > SHARES[0]), f"status {status}"
        done = crt(folder, *words)
        assert done.status == 0, done.err[-300:]
        same(folder / "run", base.trained)

    for share in SHARES:
        yield Case(f"{share} % of what it needs", partial(case, share))


def address_space() -> int:
    """Bytes that this process has now, and a child that is forked from it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def nan(base: Base) -> Iterator[Case]:
    """A learning rate at which the training breaks."""

    def case(rate: str, folder: Path) -> None:
        words = kills.train_words(
            folder / "run", base.corpus, f"max_lr={rate}", "checkpoint_every=1"
        )
        done = crt(folder, *words)
        one_line(done, 1)
        for path in (folder / "run/checkpoints").glob("*.safetensors"):
            load_model(path)
        part = json.loads((folder / "run/manifest.json").read_text())["train"]
        assert part["status"] == "running"

    for rate in ("1e38", "1e30", "1e20"):
        yield Case(f"learning rate {rate}", partial(case, rate))
