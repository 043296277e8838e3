"""Notebooks that tests write."""

import json
from collections.abc import Sequence
from pathlib import Path


def write_notebook(
    folder: Path, name: str, *cells: str, parameters: str, after: Sequence[str] = ()
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
