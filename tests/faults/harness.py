"""A command of `crt` in a process of its own, forked from one that has imported all it needs.

So a kill falls into the work, not into the imports. What a case is, and how folders are compared.
"""

import atexit
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 900  # seconds until a command is given up
GONE = 30  # seconds until what a killed command has started must have ended
STOPPING = 2.0  # seconds in which a command that is told to stop must have ended
LATE = {"environment", "time", "started", "finished", "seconds", "cpu_seconds", "processes"}
LATE |= {"peak_memory_bytes", "matmul_peak", "mfu", "precision"}  # of the machine, not the run
TIMED = {"decode.csv", "03_speed.png", "04_exits_in_time.png", "04_speeds.png"}


GROUPS = (  # a root, and the files of a group's limit and peak, in bytes
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
NOTES = r"Usage: |Try '|\[|Writing model shards"  # lines above the one that says what is wrong


class Lost(AssertionError):
    """Something that was there is gone, half-written, or not what it would have been."""


@dataclass(frozen=True)
class Case:
    """One case of a fault, tried in a folder of its own; `faults`: how many it is."""

    name: str
    run: Callable[[Path], Any]
    faults: int = 1


@dataclass
class Kind:
    """A kind of fault, what must hold in each of its cases, and what came of them."""

    name: str
    holds: str
    cases: Iterable[Case]
    alone: bool = False  # whether it is tried with nothing beside it, as it takes seconds
    tried: int = 0
    survived: int = 0
    lost: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def attempt(self, folder: Path) -> None:
        """Try every case in folders below `folder`, which go; says what fails."""
        begun = time.monotonic()
        for number, case in enumerate(self.cases):
            own = folder / f"{number}"
            own.mkdir(parents=True)
            self.tried += case.faults
            try:
                case.run(own)
                self.survived += case.faults
            except AssertionError as error:
                self.lost += isinstance(error, Lost)
                self.failures.append(f"{self.name}, {case.name}: {error}")
                print(f"  {self.failures[-1]}", flush=True)
            shutil.rmtree(own, ignore_errors=True)
        self.seconds = time.monotonic() - begun


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


class Child:
    """A call in a forked process, in a session of its own, its output in two files.

    `memory`: bytes of address space; `group`: the control group that it is put into.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        folder: Path,
        memory: int | None = None,
        group: Path | None = None,
    ) -> None:
        self.files = [folder / name for name in (".stdout", ".stderr")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            self.process = psutil.Process(self.pid)
            return
        status = 70
        try:
            atexit._clear()  # what is to be done at the end of the parent
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
            for number, path in enumerate(self.files, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if group:
                (group / "cgroup.procs").write_text("0")
            if memory:
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            status = _status(call)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def wait(self, seconds: float = PATIENCE) -> Done:
        """How it ended; AssertionError, and its end, when it takes longer."""
        status = self.ended(seconds)
        if status is None:
            self.kill()
            raise AssertionError(f"it had not ended after {seconds:g} s: {self.said()}")
        out, err = (path.read_bytes().decode(errors="replace") for path in self.files)
        return Done(status, out, err)

    def said(self) -> str:
        """The end of what it has printed."""
        return " ".join(path.read_bytes().decode(errors="replace")[-200:] for path in self.files)

    def ended(self, seconds: float) -> int | None:
        """Its status as a shell has it, negative for a signal; None if it runs on."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL to it alone; AssertionError if what it had started lives on."""
        started = self.process.children(recursive=True)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        left = psutil.wait_procs(started, timeout=GONE)[1]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        assert not left, f"{len(left)} processes that it had started outlived it"

    def stop(self, number: signal.Signals) -> tuple[float, Done]:
        """SIGTERM to it, or SIGINT to its group as a terminal sends it; seconds, and its end."""
        started = self.process.children(recursive=True)
        begun = time.monotonic()
        (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)
        done = self.wait(60)
        taken = time.monotonic() - begun
        assert not psutil.wait_procs(started, timeout=GONE)[1], "what it had started outlived it"
        return taken, done


def _status(call: Callable[[], Any]) -> int:
    try:
        call()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def command(*words: str, patch: Callable[[], None] | None = None) -> Callable[[], None]:
    """The call of `crt words...`; `patch` is called before, in the same process."""

    def call() -> None:
        from crt_lib import cli

        if patch:
            patch()
        sys.argv = ["crt", *words]
        cli.main()

    return call


def crt(folder: Path, *words: str, seconds: float = PATIENCE, **how: Any) -> Done:
    """Run `crt words...` to its end; what it prints is kept in `folder`."""
    return Child(command(*words), folder, **how).wait(seconds)


@contextlib.contextmanager
def memory_group(limit: int | None = None) -> Iterator[tuple[Path, Callable[[], int]]]:
    """A control group of at most `limit` bytes, and what gives its peak; of version 1 or 2.

    OSError where this may make none, or it has no such files.
    """
    root, most, peak = GROUPS[not GROUPS[0][0].is_dir()]
    group = root / f"crt-faults-{os.getpid()}"
    group.mkdir()
    try:
        if limit:
            (group / most).write_text(str(limit))
        yield group, lambda: int((group / peak).read_text())
    finally:
        group.rmdir()


def one_line(done: Done, *statuses: int) -> None:
    """AssertionError unless it ended with one of `statuses` and one clear line on stderr."""
    lines = done.err.strip().splitlines()
    assert "Traceback" not in done.err, "a traceback: " + " ".join(lines[-1:])
    assert done.status in statuses, f"status {done.status}: {done.err[-300:]}"
    lines = [line for line in lines if line.strip() and not re.match(NOTES, line)]
    assert len(lines) == 1, f"{len(lines)} lines on stderr: {done.err[:300]}"
    assert len(lines[0]) > 15, f"the line says little: {lines[0]}"


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file in `folder` by its name; what a clock has written is left out.

    Hidden files too: a temporary file or a lock that an uninterrupted run does not leave shows.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name not in (".stdout", ".stderr"):
            found[name] = hashlib.sha256(_without_times(path)).hexdigest()
    return found


def _without_times(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name in TIMED:
        return b""
    if path.name == "timing.jsonl":
        return b"%d rows" % data.count(b"\n")
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        # of trainings side by side, the one that ends first comes first
        return "\n".join(sorted(json.dumps(_timeless(row)) for row in rows)).encode()
    if path.suffix == ".ipynb":
        try:
            cells = json.loads(data)["cells"]
        except ValueError:  # of a run that a full disk has ended
            return data
        failed = [o for c in cells for o in c.get("outputs", ()) if o["output_type"] == "error"]
        return json.dumps([len(cells), failed]).encode()
    if path.parent.name == "notebooks" and path.suffix == ".html":
        return str(data.rstrip().endswith(b"</html>")).encode()
    return data


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(one) for name, one in value.items() if name not in LATE}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def same(folder: Path, whole: dict[str, str], what: str = "") -> None:
    """Lost unless `folder` holds what an uninterrupted run left."""
    found = contents(folder)
    names = sorted(found.keys() | whole.keys())
    differ = [name for name in names if found.get(name) != whole.get(name)]
    if differ:
        ways = {(True, True): "other", (True, False): "stray", (False, True): "missing"}
        said = [f"{name} ({ways[name in found, name in whole]})" for name in differ[:5]]
        raise Lost(f"{what} {', '.join(said)}")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of `size` at `folder`; the function remounts it with another option, as ro."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(*words: str) -> None:
        code = os.spawnlp(os.P_WAIT, words[0], *words)
        assert code == 0, f"{' '.join(words)}: status {code}"

    mount("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield lambda option: mount("mount", "-o", f"remount,{option}", str(folder))
    finally:
        mount("umount", "--lazy", str(folder))
