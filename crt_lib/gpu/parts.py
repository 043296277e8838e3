"""A long measurement in parts, for a machine that is had for minutes.

Each part has a process of its own, so that a crash, a full GPU or a hang ends nothing else, a share
of the time, and an entry in manifest.json. A second call goes on: what is done is not done again.
"""

import contextlib
import json
import multiprocessing
import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from crt_lib.files import (
    InputError,
    locked,
    read_rows,
    stop_signals,
    write_json,
    write_rows,
)
from crt_lib.runs.machine import end_with_parent
from crt_lib.runs.manifest import library_sha256, now, run_environment

TO_BEGIN = 5  # seconds that must be left to begin a part
TO_STOP = 5  # seconds that a part has from the signal to its end
Row = dict[str, Any]


class Unfinished(Exception):
    """Why a part stopped before its end; another call goes on with it."""


@dataclass(frozen=True)
class Job:
    """What a part is told: where its files go, at which size to run, until when."""

    out: Path
    toy: bool
    until: float  # as time.time() counts

    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()


@dataclass(frozen=True)
class Part:
    """A part of the whole; `run` raises `Unfinished` when its time is up, else it has failed.

    `share`: of the time that is left, against those of the parts that wait with it.
    """

    name: str
    share: float
    run: Callable[[Job], None]


class Table:
    """A CSV file that is written anew, atomically, with every row that is added.

    `key`: the columns that tell rows apart.
    """

    def __init__(self, path: Path, *key: str):
        self.path, self.key = path, key
        self.rows = read_rows(path) if path.is_file() else []

    def find(self, *key: Any) -> list[Row]:
        """The rows of this key."""
        return [row for row in self.rows if self._key(row) == key]

    def put(self, rows: Sequence[Row]) -> None:
        """Add `rows`, in place of those of the same key."""
        new = {self._key(row) for row in rows}
        self.rows = [row for row in self.rows if self._key(row) not in new] + list(rows)
        write_rows(self.path, self.rows)

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)


def run_parts(
    parts: Sequence[Part],
    out: Path,
    *,
    minutes: float,
    toy: bool,
    command: str,
) -> bool | None:
    """Run the parts that `out` does not hold yet, for `minutes` in all; whether all are done.

    None if a signal stopped it. Raises InputError when `out` is of the other size (`toy`), holds
    something else or is being written by another process.
    """
    until = time.time() + 60 * minutes - TO_STOP
    with locked(out / "manifest.json", wait=False), stop_signals() as stopped:
        manifest = _read_manifest(out / "manifest.json", toy)
        manifest["calls"].append({"command": command, "minutes": minutes, "started": now()})
        entries: dict[str, Row] = manifest["parts"]
        waiting = [p for p in parts if entries.get(p.name, {}).get("status") != "done"]
        for i, part in enumerate(waiting):
            limit = time_for(part, waiting[i:], until - time.time())
            if limit < TO_BEGIN:
                _say(f"{part.name}: not begun, no time is left")
                continue
            _say(f"{part.name}: at most {limit:.0f} s")
            entries[part.name] = {"status": "running", "started": now()}
            write_json(out / "manifest.json", manifest)
            begun = time.time()
            entries[part.name] |= _run(part, Job(out, toy, begun + limit), stopped)
            entries[part.name]["seconds"] = round(time.time() - begun, 1)
            write_json(out / "manifest.json", manifest)
            entry = entries[part.name]
            why = f": {entry['error']}" if entry["error"] else ""
            _say(f"{part.name}: {entry['status']} after {entry['seconds']:.0f} s{why}")
            if stopped.is_set():
                return None
    return all(entries.get(part.name, {}).get("status") == "done" for part in parts)


def _say(line: str) -> None:
    print(line, flush=True)


def time_for(part: Part, waiting: Sequence[Part], seconds: float) -> float:
    """What `part` gets of the `seconds` that are left to it and the others that wait."""
    return seconds * part.share / sum(other.share for other in waiting)


def _read_manifest(path: Path, toy: bool) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        rehearsal = manifest["rehearsal"]
        manifest["calls"], manifest["parts"]
    except FileNotFoundError:
        return {"rehearsal": toy, "calls": [], "parts": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not of this command ({error!r}); use another folder"
        ) from error
    if rehearsal != toy:
        kind = "a rehearsal" if rehearsal else "measurements"
        raise InputError(f"{path.parent} holds {kind}; use another folder")
    return manifest


def _run(part: Part, job: Job, stopped: threading.Event) -> Row:
    """Run `part` in a process until it ends, its time is up or `stopped`; what its entry gets."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, job, theirs))
    with _visible_devices("" if job.toy else None):
        process.start()
    theirs.close()
    told: Row = {}
    while job.left() > 0 and not stopped.is_set() and process.is_alive() and "status" not in told:
        if ours.poll(0.1):
            told |= _receive(ours)
    process.join(TO_STOP if "status" in told else 0)
    if process.is_alive():
        process.terminate()  # a training saves its checkpoint
        process.join(TO_STOP)
        process.kill()
        process.join()
        why = "stopped by a signal" if stopped.is_set() else "its time was up"
        told = {"status": "unfinished", "error": why} | told
    while ours.poll():
        if not (more := _receive(ours)):
            break
        told |= more
    broken = f"its process ended with code {process.exitcode}"
    return {"status": "failed", "error": broken, "finished": now()} | told


def _receive(pipe: Connection) -> Row:
    try:
        return pipe.recv()
    except EOFError:
        return {}


@contextlib.contextmanager
def _visible_devices(value: str | None) -> Iterator[None]:
    """What processes that are started meanwhile see of the GPUs; None: all that this one does."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif value is not None:
            del os.environ[name]


def _work(part: Part, job: Job, pipe: Connection) -> None:
    end_with_parent()
    told: Row = {"status": "done", "error": None}
    try:
        pipe.send({"environment": environment()})
        part.run(job)
    except Unfinished as why:
        told = {"status": "unfinished", "error": str(why)}
    except Exception as error:  # a part may fail in any way; the others go on
        if not isinstance(error, InputError):
            traceback.print_exc()
        told = {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    pipe.send(told)


def environment() -> dict[str, Any]:
    """`run_environment`, the library's hash, and of a GPU its driver, memory and precisions."""
    found = run_environment() | {"library_sha256": library_sha256()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "float32_products": torch.get_float32_matmul_precision(),
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()
