"""Files, locks and signals: a kill, a full disk or a bad path never leaves half of anything."""

import contextlib
import csv
import hashlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout


class InputError(ValueError):
    """Bad input. The message names the value given, the values allowed and the next step."""


class RunError(RuntimeError):
    """A run that had begun and cannot go on. The message says where and the next step."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    On any failure the temporary file is removed and `path` is untouched.
    Raises InputError when the folder cannot be written, the disk is full, or `path` is no file.
    """
    path = Path(path)
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file and stays as it is; give another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. "
            "Free some space or choose another folder; what was there is as it was."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(data: bytes) -> str:
    """The hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def check_sum(path: Path) -> None:
    """Raise InputError for a file that is not what `<file>.sha256` beside it says, if there is one.

    The line is as `sha256sum` writes it.
    """
    expected = path.with_name(f"{path.name}.sha256")
    if not expected.is_file():
        return
    found, wanted = sha256(path.read_bytes()), expected.read_text("utf-8", "replace").split()[:1]
    if [found] != wanted:
        raise InputError(
            f"{path} is not the file of {expected.name}: its SHA-256 begins {found[:12]}; fetch it "
            "again, or remove the checksum if you replaced it"
        )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Hold what is at `path` against other processes, by a hidden file beside it; free on a kill.

    Raises InputError when the folder cannot be written and, unless it is to `wait`, when another
    process holds it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise InputError(
            f"another process is writing to {path.parent}; wait for it, or use another folder"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set while inside; a second signal acts as usual."""
    stopped = threading.Event()
    heard = threading.current_thread() is threading.main_thread()  # no other may ask for signals
    signals = (signal.SIGTERM, signal.SIGINT) if heard else ()
    before = {number: signal.getsignal(number) for number in signals}

    def stop(number: int, _: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in signals:
            signal.signal(number, stop)
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV table, atomically; None, and what a row lacks, is an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of `write_rows`, numbers parsed, None where empty; InputError if bad."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or make it again") from error
    return [{key: _parse(cell) for key, cell in row.items()} for row in rows]


def _parse(cell: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(cell)
    return cell or None
