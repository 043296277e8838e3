"""The folder of a training run: what is written there while it goes on, and how it is cut back.

config.json, metrics.jsonl (deterministic), timing.jsonl (not), checkpoints/*.safetensors.
"""

import json
import os
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, atomic_path, write_json


class RunFolder:
    """Appends a run's rows to `path` and names its checkpoints."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"

    def checkpoint(self, name: str) -> Path:
        """The file of the checkpoint `name`: last, best or update-<number>."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def kept(self) -> list[Path]:
        """The checkpoints kept for good, oldest first."""
        return sorted(self.checkpoint("last").parent.glob("update-*.safetensors"))

    def prepare(self, record: dict[str, Any], updates_done: int, metrics_bytes: int) -> float:
        """Make the folder hold exactly what a run has written after `updates_done` updates.

        Rows beyond that, and what a killed write left, are removed; for 0 updates the checkpoints
        of an earlier run too. Returns the seconds those updates took.
        """
        write_json(self.path / "config.json", record)
        checkpoints = self.checkpoint("last").parent
        checkpoints.mkdir(exist_ok=True)
        # ours end in .tmp; safetensors writes under a name .tmp<random> of its own
        stale = [*checkpoints.glob(".*.tmp"), *checkpoints.glob(".tmp*")]
        if updates_done == 0:
            stale += [f for f in self.path.glob("*.csv") if f.name in ("results.csv", "exits.csv")]
            stale += checkpoints.glob("*.safetensors*")
        for file in stale:
            file.unlink()
        self.metrics.touch()
        if self.metrics.stat().st_size < metrics_bytes:
            raise InputError(
                f"{self.metrics} is shorter than its checkpoint says; "
                "restore it, or start over with resume=False (--fresh)"
            )
        os.truncate(self.metrics, metrics_bytes)
        rows = _rows(self.timing)[:updates_done]
        with atomic_path(self.timing) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows[-1]["seconds"] if rows else 0.0

    def append_metrics(self, row: dict[str, Any]) -> int:
        """Append a row; returns the file's length in bytes."""
        return _append(self.metrics, row)

    def append_timing(self, row: dict[str, Any]) -> None:
        """Append a row of wall-clock measurements, which differ from run to run."""
        _append(self.timing, row)

    def sync(self) -> None:
        """Return when the metrics are on the disk: a checkpoint must not outlive its rows."""
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order; raises InputError when there is none."""
    path = RunFolder(out).metrics
    if not path.is_file():
        raise InputError(f"{path} does not exist; train a model there first")
    return _rows(path)


def read_timing(out: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's timing.jsonl: update, seconds so far, text tokens a second."""
    return _rows(RunFolder(out).timing)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a cut last line: not yet


def _append(path: Path, row: dict[str, Any]) -> int:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        return file.tell()
