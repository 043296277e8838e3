"""What running notebooks say: on a terminal a line that changes, elsewhere one now and then."""

import contextlib
import csv
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

PERIOD = 15.0  # seconds between lines where there is no terminal
ADDED_CELLS = {"injected-parameters", "papermill-error-cell-tag"}  # by papermill: not the source's

say: Callable[[str], None] = partial(print, flush=True)


class LiveLine:
    """A line that changes: in place on a terminal, elsewhere said by `echo` again and again.

    `period`: seconds after which to show it again.
    """

    def __init__(self, echo: Callable[[str], None]):
        self._echo = echo
        self._in_place = echo is say and sys.stdout.isatty()
        self.period = 1.0 if self._in_place else PERIOD

    def show(self, text: str) -> None:
        """The line as it is now."""
        if self._in_place:
            columns = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: columns - 1]}", end="", flush=True)
        else:
            self._echo(text)

    def clear(self) -> None:
        """Remove it from a terminal, so that other lines can be written."""
        if self._in_place:
            print("\r\x1b[K", end="", flush=True)


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `call` at once and then every `seconds`, in another thread."""
    stop = threading.Event()

    def repeat() -> None:
        call()
        while not stop.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def source_cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a notebook that papermill writes, without its own; [] where it has none yet."""
    with contextlib.suppress(OSError, ValueError):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [c for c in cells if not ADDED_CELLS.intersection(c["metadata"].get("tags", []))]
    return []


def where(notebook: Path) -> tuple[str, str]:
    """The code cell that runs, of how many, and its section: ("cell 7/19", "2. Training")."""
    cells = source_cells(notebook)
    total = sum(cell["cell_type"] == "code" for cell in cells)
    code, section, found = 0, "", ("", "")
    for cell in cells:
        title = "".join(cell["source"]).partition("\n")[0]
        if cell["cell_type"] == "code":
            code += 1
            if cell["metadata"].get("papermill", {}).get("start_time"):
                found = f"cell {code}/{total}", section
        elif title.startswith("## "):
            section = title[3:].strip()
    return found


def joined(*parts: str) -> str:
    """Those that say something, with commas."""
    return ", ".join(part for part in parts if part)


def elapsed(begun: float, expected: float | None) -> str:
    """Seconds since `begun` (monotonic), of those expected where they are known."""
    seconds = f"{time.monotonic() - begun:.0f} s"
    return f"{seconds} of {expected:.0f} s expected" if expected is not None else seconds


def expected_seconds(
    names: Iterable[str], entries: Mapping[str, Mapping[str, Any]], stored: Path, profile: str
) -> dict[str, float]:
    """Seconds by notebook, of those known: an earlier run's `entries`, else the table `stored`."""
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError), stored.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["profile"] == profile]
        known = {row["notebook"]: float(row["seconds"]) for row in rows}
    known |= {n: e["seconds"] for n, e in entries.items() if e.get("status") == "done"}
    return {name: known[name] for name in names if name in known}
