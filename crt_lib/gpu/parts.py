"""A long measurement in parts, for a machine that is had for minutes.

Each part has a process of its own, so that a crash, a full GPU or a hang ends nothing else, a share
of the time, and an entry in manifest.json. A second call goes on: what is done is not done again.
"""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crt_lib.files import InputError, locked, write_json
from crt_lib.runs.machine import end_with_parent
from crt_lib.runs.manifest import library_sha256, now, run_environment

TO_BEGIN = 5  # seconds that must be left to begin a part
TO_STOP = 5  # seconds that a part has from the signal to its end
Row = dict[str, Any]


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
    """A part of the whole. `run` keeps each result as it comes: it is ended when its time is up.

    `share`: of the time that is left, against those of the parts that wait with it.
    """

    name: str
    share: float
    run: Callable[[Job], None]


def run_parts(parts: Sequence[Part], out: Path, *, minutes: float, toy: bool) -> bool:
    """Run the parts that `out` does not hold yet, for `minutes` in all; whether all are done.

    Raises InputError when `out` is of the other size (`toy`), holds something else or is being
    written by another process.
    """
    until, path = time.time() + 60 * minutes - TO_STOP, out / "manifest.json"
    with locked(path, wait=False):
        manifest: dict[str, Any] = {"rehearsal": toy, "calls": [], "parts": {}}
        if path.exists():
            manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("rehearsal") != toy:
            kind = "measurements" if toy else "a rehearsal"
            raise InputError(f"{out} holds {kind} or something else; use another folder")
        asked = [part.name for part in parts]
        manifest["calls"].append({"parts": asked, "minutes": minutes, "started": now()})
        write_json(path, manifest)
        done = [name for name, entry in manifest["parts"].items() if entry["status"] == "done"]
        waiting = [part for part in parts if part.name not in done]
        for i, part in enumerate(waiting):
            shares = sum(other.share for other in waiting[i:])
            limit = (until - time.time()) * part.share / shares
            if limit < TO_BEGIN:
                say(f"{part.name}: not begun, no time is left")
                continue
            say(f"{part.name}: at most {limit:.0f} s")
            entry = _run(part, Job(out, toy, time.time() + limit))
            why = f": {entry['error']}" if entry["error"] else ""
            say(f"{part.name}: {entry['status']} after {entry['seconds']:.0f} s{why}")
            done += [part.name] * (entry["status"] == "done")
    return all(part.name in done for part in parts)


def say(line: str) -> None:
    """Print it now."""
    print(line, flush=True)


def _run(part: Part, job: Job) -> Row:
    """Run `part` in a process until it ends or its time is up; its entry in the manifest."""
    begun = time.time()
    _record(part, job, status="running", error=None, started=now())
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(part, job))
    process.start()
    process.join(job.left())
    late = process.is_alive()
    if late:
        process.terminate()
        process.join(TO_STOP)
        process.kill()
        process.join()
    entry = _record(part, job, finished=now(), seconds=round(time.time() - begun, 1))
    if late:
        return _record(part, job, status="unfinished", error="its time was up")
    if entry["status"] == "running":
        why = f"its process ended with code {process.exitcode}"
        return _record(part, job, status="failed", error=why)
    return entry


def _record(part: Part, job: Job, **changes: Any) -> Row:
    """The part's entry in the manifest, changed."""
    path = job.out / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    entry = manifest["parts"].setdefault(part.name, {})
    entry.update(changes)
    write_json(path, manifest)
    return entry


def _work(part: Part, job: Job) -> None:
    end_with_parent()
    if job.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    told: Row = {"status": "done", "error": None}
    try:
        _record(part, job, environment=environment())
        part.run(job)
    except Exception as error:  # a part may fail in any way; the others go on
        if not isinstance(error, InputError):
            traceback.print_exc()
        told = {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    _record(part, job, **told)


def environment() -> dict[str, Any]:
    """`run_environment`, the library's hash, and a GPU's properties and driver."""
    found = run_environment() | {"library_sha256": library_sha256()}
    if torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version")
        found["gpu"] = str(torch.cuda.get_device_properties(0))
        found["driver"] = driver.read_text() if driver.is_file() else None
    return found
