"""A table that grows while it is measured: a CSV file that is written anew with every row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crt_lib.files import read_rows, write_rows

Rows = list[dict[str, Any]]


def rows_of(path: Path, **key: Any) -> Rows:
    """The rows of a table, none without the file, that have these values."""
    rows = read_rows(path) if path.is_file() else []
    return [row for row in rows if key.items() <= row.items()]


def put_rows(path: Path, rows: Rows, key: Sequence[str]) -> None:
    """Add `rows` to a table, in place of those that have the same values of `key`."""
    new = [[row[name] for name in key] for row in rows]
    kept = [row for row in rows_of(path) if [row[name] for name in key] not in new]
    write_rows(path, kept + rows)
