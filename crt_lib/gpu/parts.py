"""A long measurement in parts, for a machine that is had for minutes.

Each part has a process of its own, so that a crash, a full GPU or a hang ends nothing else, a share
of the time, and an entry in manifest.json. A second call goes on: what is done is not done again.
"""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
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


# Its share of the time that is left, against those of the parts that wait with it; and what keeps
# each result as it comes, for it is ended when its time is up.
Part = tuple[float, Callable[[Job], None]]


def run_parts(parts: Mapping[str, Part], out: Path, *, minutes: float, toy: bool) -> bool:
    """Run the parts that `out` does not hold yet, for `minutes` in all; whether all are done.

    Raises InputError when `out` is of the other size (`toy`), holds something else or is being
    written by another process.
    """
    until, kind = time.time() + 60 * minutes - TO_STOP, "gpu, rehearsed" if toy else "gpu"
    with locked(out / "gpu", wait=False):
        manifest = read_manifest(out, kind)
        entries, calls = manifest.get("parts", {}), manifest.get("calls", [])
        asked = {"parts": list(parts), "minutes": minutes, "started": now()}
        update_manifest(out, kind, calls=[*calls, asked | {"environment": _environment()}])
        waiting = [name for name in parts if entries.get(name, {}).get("status") != "done"]
        for i, name in enumerate(waiting):
            share, run = parts[name]
            limit = (until - time.time()) * share / sum(parts[other][0] for other in waiting[i:])
            if limit < TO_BEGIN:
                say(f"{name}: not begun, no time is left")
                continue
            say(f"{name}: at most {limit:.0f} s")
            begun = time.time()
            entry: Row = {"status": "running", "error": None, "started": now()}
            entries[name] = entry
            update_manifest(out, kind, parts=entries)
            entry["status"], entry["error"] = _run(run, Job(out, toy, begun + limit), limit)
            entry |= {"finished": now(), "seconds": round(time.time() - begun, 1)}
            update_manifest(out, kind, parts=entries)
            why = f": {entry['error']}" if entry["error"] else ""
            say(f"{name}: {entry['status']} after {entry['seconds']} s{why}")
    return all(entries.get(name, {}).get("status") == "done" for name in parts)


def say(line: str) -> None:
    """Print it now."""
    print(line, flush=True)


def _run(run: Callable[[Job], None], job: Job, seconds: float) -> tuple[str, str | None]:
    """The status and error of a part, run in a process until it ends or its time is up."""
    others = multiprocessing.active_children()
    with own_process() as process:
        try:
            process.submit(run, job).result(seconds)
        except TimeoutError:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
                worker.join(TO_STOP)
                worker.kill()
            return "unfinished", "its time was up"
        except BrokenProcessPool:
            return "failed", "its process crashed"
        except Exception as error:  # a part may fail in any way; the others go on
            if not isinstance(error, InputError):
                traceback.print_exception(error)
            return "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    return "done", None


def _environment() -> dict[str, Any]:
    """`run_environment`, the library's hash, and a GPU's properties and driver."""
    found = run_environment() | {"library_sha256": library_sha256(), "gpu": None, "driver": None}
    if torch.cuda.is_available():
        found["gpu"] = str(torch.cuda.get_device_properties(0))
        with contextlib.suppress(OSError):
            found["driver"] = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    return found
