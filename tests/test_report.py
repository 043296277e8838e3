"""The README's tables are what the files under results/ say."""

from pathlib import Path

import pytest

from crt_lib import InputError
from crt_lib.report import BLOCKS, render, update_readme

ROOT = Path(__file__).parent.parent


def test_the_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render(text, ROOT / "results") == text, "run `crt report`"


def test_a_stale_number_is_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    blocks = "".join(f"<!-- begin {name} -->\n1.08\n<!-- end {name} -->\n" for name in BLOCKS)
    readme.write_text(f"before\n{blocks}after\n")
    assert update_readme(readme, ROOT / "results")
    text = readme.read_text()
    assert "1.08" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert not update_readme(readme, ROOT / "results")


def test_a_missing_block_is_an_error():
    with pytest.raises(InputError, match="0 blocks"):
        render("nothing here", ROOT / "results")
