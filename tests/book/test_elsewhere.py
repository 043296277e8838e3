"""Notebooks where others run them: by papermill from another folder, and as text by jupytext."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_papermill_runs_one_from_another_folder(tmp_path):
    import papermill

    made = papermill.execute_notebook(
        ROOT / "notebooks" / "02_model.ipynb",
        tmp_path / "02.ipynb",
        parameters={"profile": "smoke", "results": str(tmp_path / "results")},
        cwd=tmp_path,
        progress_bar=False,
    )
    ran = [cell for cell in made.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in ran)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_survives_as_text(path):
    jupytext = pytest.importorskip("jupytext")
    before = jupytext.read(path)
    again = jupytext.reads(jupytext.writes(before, "py:percent"), "py:percent")
    for one, other in zip(before.cells, again.cells, strict=True):
        assert (one.cell_type, one.source) == (other.cell_type, other.source)
        assert one.metadata.get("tags") == other.metadata.get("tags")
