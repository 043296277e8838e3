"""Notebooks that tests write and run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from crt_lib.book.pipeline import reproduce

PARAMETERS = 'profile: str = "small"  # scale\nresults: str = "nowhere"  # where = which folder\n'
LOG = "from pathlib import Path\nlog = open(Path(results) / 'log.txt', 'a')\n"


def write_notebook(
    folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, after: Sequence[str] = ()
) -> None:
    """A notebook with a parameters cell and others, after the notebooks that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [("parameters", parameters), *(("", cell) for cell in cells)]
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"crt": {"after": list(after)}},
        "cells": [
            {
                "id": f"cell-{index}",
                "cell_type": "code",
                "metadata": {"tags": [tag] if tag else []},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
            for index, (tag, source) in enumerate(sources)
        ],
    }
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook))


def log(out: Path) -> list[str]:
    return (out / "log.txt").read_text().splitlines()


def run(folder: Path, out: Path, **options) -> list[str]:
    """What `reproduce` says, without the lines that tell where it is."""
    lines: list[str] = []
    reproduce("smoke", notebooks_dir=folder, out=out, echo=lines.append, **options)
    return [line for line in lines if "MiB" in line or not re.search(r", \d+ s", line)]
