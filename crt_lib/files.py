"""Writing files so that a kill, a full disk or a bad path never leaves half of one."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """Bad input. The message names the value given, the values allowed and the next step."""


class RunError(RuntimeError):
    """A run that had begun and cannot go on. The message says where and the next step."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    On any failure the temporary file is removed and `path` is untouched.
    Raises InputError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
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
    found, wanted = sha256(path.read_bytes()), expected.read_text(encoding="utf-8").split()[:1]
    if [found] != wanted:
        raise InputError(
            f"{path} is not the file of {expected.name}: its SHA-256 begins {found[:12]}; fetch it "
            "again, or remove the checksum if you replaced it"
        )


def cache_root() -> Path:
    """Where derived files are kept: `CRT_CACHE_ROOT`, or `~/.cache/crt_lib`."""
    return Path(os.environ.get("CRT_CACHE_ROOT") or Path.home() / ".cache" / "crt_lib")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
