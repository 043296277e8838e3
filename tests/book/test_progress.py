"""What running notebooks say: which one, which cell, how long, and at the end a line for each."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import tiny_notebooks

from crt_lib.book import progress
from crt_lib.book.batch import reproduce_parallel
from crt_lib.book.pipeline import reproduce

WAITS = "import time\nfrom pathlib import Path\nwhile not (Path(results) / 'go').exists(): "


def write_notebooks(folder: Path) -> None:
    """01, and 02 whose last cell waits until a file `go` is in the results."""
    parameters = 'results: str = "nowhere"'
    tiny_notebooks.write_notebook(folder, "01_first", "1 + 1", parameters=parameters)
    cells = ("1 + 1", f"{WAITS}time.sleep(0.05)")
    tiny_notebooks.write_notebook(folder, "02_second", *cells, parameters=parameters)


class Listener:
    """Keeps the lines, and lets notebook 02 end when it has heard that its last cell runs."""

    def __init__(self, out: Path):
        self.out, self.lines = out, []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if re.search("02_second, cell 3/3", line):
            (self.out / "go").touch()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_says_where_it_is_and_ends_with_a_line_a_notebook(tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(progress, "PERIOD", 0.1)
    folder, out = tmp_path / "notebooks", tmp_path / "smoke"
    write_notebooks(folder)
    how = {"notebooks_dir": folder, "out": out}

    def run(**more) -> list[str]:
        heard = Listener(out)
        if jobs == 1:
            reproduce("smoke", **how, **more, echo=heard)
        else:
            reproduce_parallel("smoke", jobs, **how, **more, echo=heard)
        return heard.lines

    lines = run()
    text = "\n".join(lines)
    assert re.search(r"01_first, (cell \d/2, )?\d+ s", text) and "expected" not in text
    assert re.search(r"02_second, cell 3/3, \d+ s", text)
    assert re.search(r"^[12]/2 01_first +\d+\.\d s", text, re.M)
    table = text[text.index("notebook  ") :]
    assert re.search(r"^01_first +\d+\.\d +\d+$", table, re.M)
    assert re.search(r"^02_second +\d+\.\d +\d+$", table, re.M)
    assert str(out / "notebooks") in table and str(out / "manifest.json") in lines[-1]

    if jobs > 1:
        return  # what is expected does not depend on it
    (out / "go").unlink()
    again = "\n".join(run(fresh=True))
    assert re.search(r"01_first, .*\d+ s of \d+ s expected", again)


def notebook_text(*cells: tuple[str, str, bool, list[str]]) -> str:
    return json.dumps(
        {
            "cells": [
                {
                    "cell_type": kind,
                    "source": source,
                    "metadata": {"papermill": {"start_time": "x" if begun else None}, "tags": tags},
                }
                for kind, source, begun, tags in cells
            ]
        }
    )


def test_where_counts_the_code_cells_of_the_source(tmp_path):
    path = tmp_path / "01.running.ipynb"
    assert progress.where(path) == ("", "")
    path.write_text('{"cells": [')
    assert progress.where(path) == ("", "")
    cells = [
        ("markdown", "# Title", True, []),
        ("code", "x = 1", True, ["parameters"]),
        ("code", "x = 2", True, ["injected-parameters"]),
        ("markdown", "## 1. The text\n\nHow it is cut.", True, []),
        ("code", "read()", True, []),
        ("markdown", "## 2. The model", False, []),
        ("code", "train()", False, []),
    ]
    path.write_text(notebook_text(*cells))
    assert progress.where(path) == ("cell 2/3", "1. The text")
    path.write_text(notebook_text(*cells[:5], *((*cell[:2], True, []) for cell in cells[5:])))
    assert progress.where(path) == ("cell 3/3", "2. The model")


def test_expected_is_of_an_earlier_run_else_of_the_stored_table(tmp_path):
    table = tmp_path / "notebooks.csv"
    entries = {
        "01_data": {"status": "done", "seconds": 3.5},
        "02_model": {"status": "failed", "seconds": 1.0},
        "03_train": {"status": "running"},
    }
    names = ["01_data", "02_model", "03_train", "04_more"]
    assert progress.expected_seconds(names, entries, table, "quick") == {"01_data": 3.5}
    table.write_text(
        "notebook,profile,seconds\n01_data,quick,5\n02_model,quick,7\n03_train,smoke,9\n"
    )
    found = progress.expected_seconds(names, entries, table, "quick")
    assert found == {"01_data": 3.5, "02_model": 7.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_changes_and_goes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    line = progress.LiveLine(progress.say)
    line.show("1/9 01_data, cell 1/9, 3 s")
    line.show("1/9 01_data, 4 s")
    line.clear()
    assert sys.stdout.getvalue().split("\r\x1b[K") == [
        "",
        "1/9 01_data, cell 1",
        "1/9 01_data, 4 s",
        "",
    ]
    said: list[str] = []
    line = progress.LiveLine(said.append)  # whoever listens is no terminal
    line.show("1/9 01_data, cell 1/9, 3 s")
    line.clear()
    assert said == ["1/9 01_data, cell 1/9, 3 s"] and line.period == progress.PERIOD
