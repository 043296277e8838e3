"""A table that grows while it is measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crt_lib.files import read_rows, write_rows


class Table:
    """A CSV file that is written anew, atomically, with every row that is added.

    `key`: the columns that tell rows apart.
    """

    def __init__(self, path: Path, *key: str):
        self.path, self.key = path, key
        self.rows = read_rows(path) if path.is_file() else []

    def find(self, *values: Any) -> list[dict[str, Any]]:
        """The rows of this key."""
        return [row for row in self.rows if self._of(row) == values]

    def put(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add `rows`, in place of those of the same key."""
        new = {self._of(row) for row in rows}
        self.rows = [row for row in self.rows if self._of(row) not in new] + list(rows)
        write_rows(self.path, self.rows)

    def _of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)
