"""A long measurement in parts, for a machine that is had for minutes.

Each part has a process of its own, so that a crash, a full GPU or a hang ends nothing else, a share
of the time, and an entry in manifest.json. A second call goes on: what is done is not done again.
"""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crt_lib.bench.trial import own_process
from crt_lib.files import InputError, locked
from crt_lib.runs.manifest import (
    library_sha256,
    now,
    read_manifest,
    run_environment,
    update_manifest,
)

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
    until, kind = time.time() + 60 * minutes - TO_STOP, "gpu, rehearsed" if toy else "gpu"
    with locked(out / "gpu", wait=False):
        manifest = read_manifest(out, kind)
        entries, calls = manifest.get("parts", {}), manifest.get("calls", [])
        asked = {"parts": [part.name for part in parts], "minutes": minutes, "started": now()}
        update_manifest(out, kind, calls=[*calls, asked | {"environment": environment()}])
        waiting = [p for p in parts if entries.get(p.name, {}).get("status") != "done"]
        for i, part in enumerate(waiting):
            shares = sum(other.share for other in waiting[i:])
            limit = (until - time.time()) * part.share / shares
            if limit < TO_BEGIN:
                say(f"{part.name}: not begun, no time is left")
                continue
            say(f"{part.name}: at most {limit:.0f} s")
            entry: Row = {"status": "running", "error": None, "started": now()}
            begun, entries[part.name] = time.time(), entry
            update_manifest(out, kind, parts=entries)
            entry |= _run(part, Job(out, toy, begun + limit))
            entry |= {"finished": now(), "seconds": round(time.time() - begun, 1)}
            update_manifest(out, kind, parts=entries)
            why = f": {entry['error']}" if entry["error"] else ""
            say(f"{part.name}: {entry['status']} after {entry['seconds']:.0f} s{why}")
    return all(entries.get(part.name, {}).get("status") == "done" for part in parts)


def say(line: str) -> None:
    """Print it now."""
    print(line, flush=True)


def _run(part: Part, job: Job) -> Row:
    """Run `part` in a process until it ends or its time is up; its status and error."""
    with own_process() as process:
        others = multiprocessing.active_children()
        try:
            process.submit(part.run, job).result(job.left())
        except TimeoutError:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
                worker.join(TO_STOP)
                worker.kill()
            return {"status": "unfinished", "error": "its time was up"}
        except BrokenProcessPool:
            return {"status": "failed", "error": "its process crashed"}
        except Exception as error:  # a part may fail in any way; the others go on
            if not isinstance(error, InputError):
                traceback.print_exception(error)
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            return {"status": "failed", "error": what}
    return {"status": "done", "error": None}


def environment() -> dict[str, Any]:
    """`run_environment`, the library's hash, and a GPU's properties and driver."""
    found = run_environment() | {"library_sha256": library_sha256(), "gpu": None, "driver": None}
    if torch.cuda.is_available():
        found["gpu"] = str(torch.cuda.get_device_properties(0))
        with contextlib.suppress(OSError):
            found["driver"] = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    return found
