"""The site: pages and notebooks lead to each other, and a link that leads nowhere stops it."""

import json
import shutil
from pathlib import Path

import make_site
import pytest
from make_site import broken_links, build

from crt_lib.files import InputError, write_text

ROOT = Path(__file__).parents[2]


def notebook(text: str) -> str:
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": [text]}]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout, whose API is made without pdoc."""
    root = tmp_path / "checkout"
    write_text(root / "README.md", "# First\n\n[use](docs/usage.md#On-text), ![a](results/a.png)")
    write_text(root / "docs" / "usage.md", "# Use\n\n## On text\n\n[01](../notebooks/01_x.ipynb)")
    write_text(root / "notebooks" / "01_x.ipynb", notebook("# 01 X\n\n[first](../README.md)"))
    write_text(root / "results" / "a.png", "a picture")
    write_text(root / "crt_lib" / "model.py", '"""A model of its own."""\n')
    write_text(root / "crt_lib" / "text" / "__init__.py", '"""A room."""\n')
    shutil.copy(ROOT / "pyproject.toml", root)

    def api(root: Path, folder: Path) -> None:
        write_text(folder / "crt_lib.html", "<p id='x'>all</p>")
        write_text(folder / "crt_lib" / "model.html", "<a href='../crt_lib.html#x'>up</a>")
        write_text(folder / "crt_lib" / "text.html", "<p>a room</p>")

    monkeypatch.setattr(make_site, "_api", api)
    return root


def test_pages_and_notebooks_lead_to_each_other(checkout, tmp_path):
    built = tmp_path / "site"
    assert build(checkout, built) == 7
    assert 'href="docs/usage.html#On-text"' in (built / "README.html").read_text()
    assert 'href="../notebooks/01_x.html"' in (built / "docs" / "usage.html").read_text()
    assert 'href="../README.html"' in (built / "notebooks" / "01_x.html").read_text()
    assert (built / "results" / "a.png").read_text() == "a picture"
    index = (built / "index.html").read_text()
    for said in ("01 X", "First", "Use", "crt_lib.model", "crt_lib.text"):
        assert said in index
    (built / "old.html").touch()
    assert build(checkout, built) == 7 and not (built / "old.html").exists()


def test_a_run_with_traces_has_its_explorer(checkout, tmp_path):
    (checkout / "results" / "small").mkdir()
    (checkout / "results" / "small" / "crt2").symlink_to(ROOT / "results" / "small" / "crt2")
    built = tmp_path / "site"
    assert build(checkout, built) == 8
    assert 'href="results/small/crt2/explorer.html"' in (built / "index.html").read_text()
    page = (built / "results" / "small" / "crt2" / "explorer.html").read_text()
    assert "<title>Exit explorer: crt2</title>" in page


@pytest.mark.parametrize(
    ("link", "where"),
    [
        ("docs/absent.md", "README.html: docs/absent.md"),
        ("docs/usage.md#Absent", "README.html: docs/usage.html#Absent"),
        ("../secret.txt", "README.html: ../secret.txt"),
    ],
)
def test_a_link_that_leads_nowhere_is_an_error(checkout, tmp_path, link, where):
    (tmp_path / "secret.txt").write_text("not of the checkout")
    write_text(checkout / "README.md", f"# First\n\n[a link]({link})")
    with pytest.raises(InputError, match="lead nowhere") as caught:
        build(checkout, tmp_path / "site")
    assert str(caught.value).splitlines()[1:] == [where]


def test_links_to_elsewhere_and_within_a_page_are_no_broken_ones(tmp_path):
    links = ["https://example.org/x", "mailto:x@example.org", "data:,x", "#here", "b%20c.txt"]
    write_text(tmp_path / "b c.txt", "")
    text = "".join(f'<a href="{link}">x</a>' for link in links)
    write_text(tmp_path / "a.html", f'<p id="here">{text}</p><script>"<a href=no>"</script>')
    assert broken_links(tmp_path) == []
    write_text(tmp_path / "a.html", '<img src="/b c.txt"><a href="#there">x</a>')
    assert sorted(broken_links(tmp_path)) == ["a.html: #there", "a.html: /b c.txt"]


def test_a_folder_of_something_else_is_left_alone(checkout, tmp_path):
    write_text(tmp_path / "mine" / "kept.txt", "kept")
    with pytest.raises(InputError, match="is not a site"):
        build(checkout, tmp_path / "mine")
    assert (tmp_path / "mine" / "kept.txt").read_text() == "kept"


def test_without_pdoc_it_says_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(make_site, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="make docs"):
        make_site._api(ROOT, tmp_path)
