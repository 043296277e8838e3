"""Text: named corpora and the user's own folders, split into train, valid and test."""

import itertools
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from crt_lib.data import MIN_LINE
from crt_lib.files import InputError, cache_root, sha256, write_text
from crt_lib.text import docstrings, grammar

SPLITS = ("train", "valid", "test")
WIKITEXT = ("wikitext-103", "wikitext-2")
CORPORA = (*WIKITEXT, "docstrings", "grammar")

_GRAMMAR_SPLITS = {"train": (9_500, 1), "valid": (1_250, 2), "test": (1_250, 3)}  # sentences, seed
_ARTICLE = re.compile(r"^ \n = (?!= )[^\n]* = \n(?= \n)", re.MULTILINE)
_PARAGRAPH = re.compile(r".+?(?:\n(?:[^\S\n]*\n)+|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Split:
    """The text of one split, exactly as read."""

    text: str

    @cached_property
    def n_words(self) -> int:
        """Words between white space plus one end of line a line (the WikiText convention)."""
        return len(self.text.split()) + self.text.count("\n")

    @cached_property
    def n_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode())

    @cached_property
    def sha256(self) -> str:
        """Of the UTF-8 text."""
        return sha256(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Three splits of text and where they come from."""

    name: str  # as `load_corpus` takes it
    train: Split
    valid: Split
    test: Split
    entropy: float | None = None  # exact entropy rate in nats a word, where it is known
    provenance: dict[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> Split:
        """The split of that name; raises InputError for an unknown one."""
        if name not in SPLITS:
            raise InputError(f"unknown split {name!r}; choose one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def documents(self, name: str) -> list[str]:
        """A split cut into documents whose concatenation is its text.

        Articles of a WikiText corpus, sentences of `grammar`, and elsewhere what blank lines
        separate (a docstring in `docstrings`).
        """
        text = self.split(name).text
        if self.name in WIKITEXT:
            starts = [match.start() for match in _ARTICLE.finditer(text)]
            bounds = [0, *(start for start in starts if start), len(text)]
            return [text[a:b] for a, b in itertools.pairwise(bounds)]
        if self.name == "grammar":
            return text.splitlines(keepends=True)
        return _PARAGRAPH.findall(text)


def load_corpus(name: str) -> Corpus:
    """Load a corpus: one of `CORPORA`, or the path of a folder with {train,valid,test}.txt.

    WikiText is read from `CRT_DATA_ROOT` when that is set, otherwise from the Hugging Face hub
    (raw variants; kept under `cache_root()`, so that the network is needed once).
    Raises InputError for an unknown name, a missing or empty split, text that is not UTF-8, or a
    hub that cannot be reached. There is no fallback from one source to another.
    """
    name = str(name)
    if name == "docstrings":
        texts, versions = docstrings.collect()
        provenance = {"source": "docstrings of installed packages", "packages": versions}
        return _corpus(name, texts, provenance)
    if name == "grammar":
        texts = {split: grammar.sample(n, seed) for split, (n, seed) in _GRAMMAR_SPLITS.items()}
        provenance = {
            "source": "sampled from crt_lib.text.grammar",
            "sentences": {split: n for split, (n, _) in _GRAMMAR_SPLITS.items()},
            "seeds": {split: seed for split, (_, seed) in _GRAMMAR_SPLITS.items()},
        }
        return _corpus(name, texts, provenance, entropy=grammar.entropy_rate())
    if name in WIKITEXT:
        root = os.environ.get("CRT_DATA_ROOT")
        return _local_wikitext(name, Path(root)) if root else _hub_wikitext(name)
    if name and Path(name).is_dir():
        texts = {split: _read(Path(name) / f"{split}.txt") for split in SPLITS}
        return _corpus(name, texts, {"source": "local folder"})
    raise InputError(
        f"unknown corpus {name!r}; choose one of {', '.join(CORPORA)}, or the path of an existing "
        "folder with train.txt, valid.txt and test.txt"
    )


def _corpus(
    name: str, texts: dict[str, str], provenance: dict[str, Any], entropy: float | None = None
) -> Corpus:
    for split, text in texts.items():
        if not text.strip():
            raise InputError(f"the {split} split of corpus {name!r} is empty; it needs some text")
    splits = {split: Split(text) for split, text in texts.items()}
    return Corpus(name, **splits, entropy=entropy, provenance=provenance)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}. A corpus needs all of its splits: "
            f"{', '.join(SPLITS)}"
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error


def _local_wikitext(name: str, root: Path) -> Corpus:
    folders = [root / name, root / f"{name}-raw"]
    if root.name in (name, f"{name}-raw"):
        folders.append(root)
    for folder in folders:
        for kind in ("tokens", "raw"):
            files = {split: folder / f"wiki.{split}.{kind}" for split in SPLITS}
            if any(path.exists() for path in files.values()):
                texts = {split: _read(path) for split, path in files.items()}
                provenance = {
                    "source": "local files under CRT_DATA_ROOT",
                    "files": [path.name for path in files.values()],
                }
                return _corpus(name, texts, provenance)
    raise InputError(
        f"no {name} in CRT_DATA_ROOT: looked for wiki.train.tokens or wiki.train.raw in "
        f"{' and '.join(map(str, folders))}. Put the files there, unset CRT_DATA_ROOT to fetch "
        "them from the Hugging Face hub, or use corpus 'docstrings', which needs no network"
    )


def _hub_wikitext(name: str) -> Corpus:
    repository, variant = "Salesforce/wikitext", f"{name}-raw-v1"
    provenance = {"source": f"{repository} on the Hugging Face hub", "variant": variant}
    folder = cache_root() / variant
    files = {split: folder / f"{split}.txt" for split in SPLITS}
    marks = {split: folder / f"{split}.sha256" for split in SPLITS}
    kept = {split: _read_verified(files[split], marks[split]) for split in SPLITS}
    texts = {split: text for split, text in kept.items() if text is not None}
    if len(texts) < len(SPLITS):
        wanted = f"corpus {name!r} ({repository}, {variant})"
        advice = (
            "set CRT_DATA_ROOT to a folder that holds "
            f"{name}/wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, "
            "or use corpus 'docstrings', which needs no network"
        )
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(
                f"cannot fetch {wanted}: the package datasets is not installed; "
                f"pip install 'crt-lm[notebooks]', or {advice}"
            ) from error
        check_hub(wanted, advice)
        try:
            rows = load_dataset(repository, variant)
            parts = {split: rows["validation" if split == "valid" else split] for split in SPLITS}
            # the hub's rows keep their line end, save that a blank line has become an empty row
            texts = {s: "".join(row or " \n" for row in parts[s]["text"]) for s in SPLITS}
        except Exception as error:  # whatever the library raises, the next step is the same
            raise InputError(f"cannot fetch {wanted}: {error}. Otherwise {advice}") from error
        for split, text in texts.items():
            write_text(files[split], text)
            write_text(marks[split], sha256(text.encode()))
    return _corpus(name, texts, provenance)


def _read_verified(path: Path, mark: Path) -> str | None:
    try:
        data = path.read_bytes()
        return data.decode() if sha256(data) == mark.read_text() else None
    except (OSError, UnicodeDecodeError):
        return None


def check_hub(wanted: str, advice: str) -> None:
    """Raise InputError within seconds when the Hugging Face hub cannot be reached.

    The hub's own client tries again for minutes. A proxy, or offline mode with a filled cache, is
    left to that client.
    """
    endpoint = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if endpoint.scheme in urllib.request.getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"cannot fetch {wanted}: {endpoint.hostname} cannot be reached ({error}). "
            f"Connect to the network, or {advice}"
        ) from error


def released_lines(text: str) -> list[str]:
    """The lines longer than 50 characters, line end included: the rows the hub's dataset holds."""
    return [line for line in _lines(text) if len(line) > MIN_LINE]


def _lines(text: str) -> list[str]:
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]  # what follows the last line end has none
    return lines
