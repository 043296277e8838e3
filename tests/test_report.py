"""The README's tables are what the files under results/ say."""

import shutil
from pathlib import Path

import pytest

from crt_lib import InputError
from crt_lib.report import PAGES, render, small_results, update_page
from crt_lib.runs import read_rows, write_rows

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_are_up_to_date(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render(text, ROOT / "results", PAGES[page]) == text, "run `crt report`"


def test_a_stale_number_is_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    names = PAGES["README.md"]
    blocks = "".join(f"<!-- begin {name} -->\n1.08\n<!-- end {name} -->\n" for name in names)
    readme.write_text(f"before\n{blocks}after\n")
    assert update_page(readme, ROOT / "results")
    text = readme.read_text()
    assert "1.08" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert not update_page(readme, ROOT / "results")


def test_other_seeds_of_the_small_run_are_averaged_in(tmp_path):
    shutil.copytree(ROOT / "results" / "small", tmp_path / "small", ignore=_heavy)
    rows = read_rows(ROOT / "results" / "small" / "crt2" / "results.csv")
    shutil.rmtree(tmp_path / "small" / "seeds", ignore_errors=True)
    alone = small_results(tmp_path)
    write_rows(
        tmp_path / "small" / "seeds" / "7" / "results.csv",
        [row | {"bits_per_byte": (row["bits_per_byte"] or 0) + 0.2} for row in rows],
    )
    both = small_results(tmp_path)
    (last,) = (
        row["bits_per_byte"]
        for row in rows
        if (row["split"], row["protocol"], row["exit"]) == ("test", "honest", 4)
    )
    assert f"| {last:.3f} |" in alone and f"| {last + 0.1:.3f} |" in both
    assert "seed 0;" in alone and "mean of seeds 0, 7; " in both
    assert "at most 0.200 bits apart" in both


def _heavy(folder, names):
    return [name for name in names if name in ("checkpoints", "traces", "figures")]


def test_a_missing_block_is_an_error():
    with pytest.raises(InputError, match="0 blocks"):
        render("nothing here", ROOT / "results", ["claims"])
