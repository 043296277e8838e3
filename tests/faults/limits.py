"""Two processes in one folder, too little memory, and a loss that is no number."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import kills
from base import Base
from harness import Case, Child, Kind, command, crt, memory_group, one_line, same

from crt_lib.checkpoint import load_model

SHARES = (25, 50, 75)  # percent of the memory that a training needs
MARGIN = 400_000_000  # bytes of address space beyond what the imports take


def kinds(base: Base) -> Iterator[Kind]:
    """The kinds of this module."""
    yield Kind(
        "two processes in one folder", "one goes on; the other says why it does not", twins(base)
    )
    yield Kind("out of memory", "it goes on to the same files", memory(base))
    holds = "ended by the kernel in the middle of its work, it goes on to the same files"
    yield Kind("out of memory, in a control group", holds, group_memory(base))
    yield Kind(
        "NaN loss", "one line that names the update; every checkpoint can be read", nan(base)
    )


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
