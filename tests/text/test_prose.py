"""The corpus of pinned packages: what is read of a wheel, and that the text is the known one."""

import csv
import gzip
import json
import zipfile
from pathlib import Path

import pytest

from crt_lib.files import InputError, sha256
from crt_lib.text import prose
from crt_lib.text.corpus import SPLITS, cache_root, kept, load_corpus

SHARED = "This is a sentence that is in each of the packages."
GIVEN = {  # the module of each package, by its split
    "train": '"""The first of the packages to be read.\n\n{shared}\n"""\n',
    "valid": '"""{shared}\n\nThis one is of the Second, and it is to be kept. {shared}\n"""\n',
    "test": '"""This one is of the Third, and it is to be kept.\n"""\n'
    "# A comment is read as well when\n# it is a sentence of the text.\n",
}
TEXTS = {
    "train": f"The first of the packages to be read.\n{SHARED}\n\n",
    "valid": f"This one is of the Second, and it is to be kept. {SHARED}\n\n",
    "test": "A comment is read as well when it is a sentence of the text.\n\n",
}


def wheel(folder: Path, package: str, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        about = f"{package}-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a wheel for each split, from which alone pip fetches, and their table."""
    folder, table = tmp_path / "wheels", tmp_path / "packages.csv"
    rows = []
    for split, module in GIVEN.items():
        path = wheel(folder, f"of{split}", {"module.py": module.format(shared=SHARED)})
        rows.append([f"of{split}", "1.0", path.name, sha256(path.read_bytes()), "MIT", split])
    with table.open("w", newline="") as file:
        columns = ["package", "version", "file", "sha256", "licence", "split"]
        csv.writer(file).writerows([columns, *rows])
    monkeypatch.setattr(prose, "PACKAGES", table)
    sums = {split: sha256(text.encode()) for split, text in TEXTS.items()}
    monkeypatch.setattr(prose, "SHA256", sums)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", folder), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.setenv("CRT_CACHE_ROOT", str(tmp_path / "cache"))
    return folder


def test_what_is_read_of_a_wheel(tmp_path: Path):
    described = {"shapes": [{"documentation": "<p>The name of <b>a</b> thing.</p>A &amp; it."}]}
    path = wheel(
        tmp_path,
        "mixed",
        {
            "a/code.py": '"""This is the docstring of a module."""\nx = 1  # It is not read.\n'
            "# A comment of two lines is\n# read as it is one text.\n",
            "a/later.py": "type A = int  # it needs Python 3.12\n",
            "a/later.pyi": '"""This is the docstring of a stub."""\n',
            "a/tests/code.py": '"""This is the docstring of a test."""\n',
            "b/page.md": "# The title of the page\n\nThis is a paragraph of the page.\n",
            "b/api.json.gz": gzip.compress(json.dumps(described).encode()),
            "b/broken.json": "{",
            "b/code.c": "/* This is a comment of the C code. */",
        },
    )
    assert list(prose.documents(path)) == [
        ["This is the docstring of a module.", "A comment of two lines is read as it is one text."],
        ["This is the docstring of a stub."],
        ["The name of a thing."],
        ["This is a paragraph of the page."],
    ]


def test_splits_share_no_paragraph_and_are_made_once(wheels: Path, monkeypatch):
    corpus = load_corpus("prose")
    assert {split: corpus.split(split).text for split in SPLITS} == TEXTS
    assert corpus.documents("train") == [TEXTS["train"]]
    assert corpus.provenance["packages"]["valid"] == {"ofvalid 1.0": "MIT"}
    assert corpus.provenance["sha256"] == prose.SHA256
    assert not list(cache_root().rglob("*.whl"))
    monkeypatch.setattr(prose, "collect", lambda keep: pytest.fail("made again"))
    assert load_corpus("prose").test.text == TEXTS["test"]


def test_of_a_package_no_more_than_the_most_in_whole_files(wheels: Path, monkeypatch):
    monkeypatch.setattr(prose, "_MOST", max(map(len, TEXTS.values())))
    paragraphs = [line for line in TEXTS["train"].split("\n") if line]
    twice = json.dumps([paragraphs, ["Another file of the package is too much."]]).encode()

    def keep(name: str, make) -> bytes:
        return twice if name.endswith("/oftrain") else make()

    assert prose.collect(keep)["train"] == TEXTS["train"]


@pytest.mark.parametrize("spoilt", [True, False])
def test_a_wheel_that_is_another_or_missing_is_named_and_the_rest_kept(
    wheels: Path, monkeypatch, spoilt: bool
):
    path = wheels / "oftest-1.0-py3-none-any.whl"
    whole = path.read_bytes()
    if spoilt:
        path.write_bytes(whole + b"\0")
    else:
        path.unlink()
    with pytest.raises(InputError) as error:
        load_corpus("prose")
    said = ("HASHES" if spoilt else "No matching", path.name, "network", "PIP_FIND_LINKS")
    assert all(part in str(error.value) for part in said)
    path.write_bytes(whole)
    (wheels / "oftrain-1.0-py3-none-any.whl").unlink()  # it was read before
    assert load_corpus("prose").train.text == TEXTS["train"]


def test_another_text_than_the_known_one_is_refused(wheels: Path, monkeypatch):
    monkeypatch.setitem(prose.SHA256, "valid", 64 * "0")
    with pytest.raises(InputError, match=r"valid split .* is not the known text"):
        prose.collect(kept)


def test_the_pinned_packages_are_pinned_whole():
    rows = prose.packages()
    assert len({row["package"] for row in rows}) == len(rows) == len({r["sha256"] for r in rows})
    for row in rows:
        assert all(row.values()) and len(row["sha256"]) == 64
        assert row["split"] in SPLITS and row["file"].endswith(".whl")
    assert all(len(digest) == 64 for digest in prose.SHA256.values())
