"""English prose from the docstrings of the installed numpy, pandas and matplotlib.

Real text with no download. The sources are read with `ast`; none of the packages is imported.
"""

import ast
import contextlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from crt_lib.files import InputError, sha256

PACKAGES = ("numpy", "pandas", "matplotlib")

_SKIPPED_FOLDERS = {"tests", "testing", "_vendor", "vendored-meson"}
_ADMONITIONS = ("note", "warning", "caution", "tip", "important", "attention", "hint")
_UNDERLINE = re.compile(r"([-=~^*#\"'+`])\1{2,}\s*")
_DIRECTIVE = re.compile(r"\.\. *(\[?[\w-]+\]?)(::)?")
_BULLET = re.compile(r"(?:[-*+•]|\(?\w{1,2}[.)])\s+(?=\S)")
_MARKUP = (
    (re.compile(r"(?<![\w`]):[\w:+-]+:`"), "`"),  # :func:`name` keeps the name
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),  # `text <target>`_
    (re.compile(r"`[~.!]+"), "`"),
    (re.compile(r"\s?\[[\w#*]+\]_"), ""),  # references to footnotes
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}([\w.-]+)\*{1,2}(?![\w*])"), r"\1"),
)
_NOT_PROSE = re.compile(r"[=<>|{}\\@#$^~\[\]%*`_]{2}|[=<>|{}\\@$^~\[\]*`]|://|%\(|>>>|\.\. |::| : ")
_PLAIN_WORD = re.compile(r"[\"'(]?[A-Za-z][a-z]*(?:['-][A-Za-z]?[a-z]+)*[\"').,;:!?]*")
_COMMON_WORDS = (
    "a an the of to in is are be by for with that this it if not as or and on at from which when "
    "will can has have should may used use all any each into than no only but these"
)
_COMMON = frozenset(_COMMON_WORDS.split())


def versions() -> dict[str, str]:
    """The version of every package of PACKAGES; raises InputError when one is missing."""
    try:
        return {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"corpus 'docstrings' reads {', '.join(PACKAGES)}, and {error.name} is not installed; "
            "install the notebook extra: pip install 'crt-lm[notebooks]'"
        ) from error


def collect() -> dict[str, str]:
    """The text of every split.

    A paragraph is one line and a docstring ends with a blank line. Modules are dealt to the splits
    by a hash of their name, about 80/10/10; a paragraph found in several places is kept at the
    first, train before valid before test.
    """
    dealt: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for name, path in _modules():
        tenth = int(sha256(f"docstrings:{name}".encode())[:16], 16) % 10
        dealt[{0: "valid", 1: "test"}.get(tenth, "train")].append(path)
    seen: set[str] = set()
    texts = {}
    for split, paths in dealt.items():
        found = (docstring for path in paths for docstring in docstrings(path.read_bytes()))
        texts[split] = text(map(prose, found), _letters, seen)
    return texts


def text(documents: Iterable[list[str]], parts: Callable[[str], set[str]], seen: set[str]) -> str:
    """Documents as text: a paragraph is a line, and a document ends with a blank line.

    A paragraph is left out when all its `parts` are in `seen`, where the parts of others are put.
    """

    def is_new(paragraph: str) -> bool:
        found = parts(paragraph)
        new = not found <= seen
        seen.update(found)
        return new

    kept = (list(filter(is_new, paragraphs)) for paragraphs in documents)
    return "".join("\n".join(paragraphs) + "\n\n" for paragraphs in kept if paragraphs)


def prose(docstring: str) -> list[str]:
    """The paragraphs of running English in a docstring, each on one line, markup removed.

    Doctests, code, tables, headings, directives and the names and types of parameter lists are
    left out; what is said about a parameter stays where it is made of sentences.
    """
    paragraphs = map(_plain, _blocks(inspect.cleandoc(docstring)))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a Python source; of a later Python's, none."""
    with contextlib.suppress(SyntaxError):
        yield from _docstrings_of(ast.parse(source))


def _letters(paragraph: str) -> set[str]:
    return {re.sub(r"[^a-z]+", " ", paragraph.lower()).strip()}


def _modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        root = Path(str(importlib.metadata.distribution(package).locate_file(package)))
        paths = {path.relative_to(root).with_suffix("").parts: path for path in root.rglob("*.py")}
        for parts in sorted(parts for parts in paths if not _SKIPPED_FOLDERS.intersection(parts)):
            yield ".".join((package, *parts)), paths[parts]


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    # statements alone are visited: expressions are most of a tree and hold no docstring
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        name = getattr(function, "id", "") or getattr(function, "attr", "")
        if name.startswith("add_newdoc"):
            # numpy documents its C functions by calls that pass the docstring
            for value in ast.walk(node.value):
                if isinstance(value, ast.Constant) and "\n" in str(value.value):
                    yield str(value.value)
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            yield from _docstrings_of(child)


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of neighbouring lines with one indent; headings, directives and literals dropped."""
    lines = text.expandtabs().split("\n")
    block: list[str] = []
    indent, skip_deeper_than = 0, None
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        body = line.strip()
        depth = len(line) - len(line.lstrip())
        if skip_deeper_than is not None and body:
            if depth > skip_deeper_than:
                continue
            skip_deeper_than = None
        bullet = _BULLET.match(body)
        if not body or depth != indent or bullet or body.startswith((">>>", "..")):
            if block:
                yield block
            block, indent = [], depth
        directive = _DIRECTIVE.match(body)
        if directive and directive[1] not in _ADMONITIONS:
            skip_deeper_than = depth
        elif body and not (
            directive or _UNDERLINE.fullmatch(body) or _UNDERLINE.fullmatch(following.strip())
        ):
            if bullet:
                body = body[bullet.end() :]
                indent = depth + bullet.end()
            block.append(body)
            if body.endswith("::"):
                skip_deeper_than = depth
    if block:
        yield block


def _plain(lines: list[str]) -> str:
    text = " ".join(lines)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _is_prose(text: str) -> bool:
    words = text.split()
    if len(words) < 5 or not text[0].isupper() or text[-1] not in ".!?" or _NOT_PROSE.search(text):
        return False
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    common = sum(word.lower().strip(",.;:()") in _COMMON for word in words)
    return plain >= 0.8 * len(words) and common >= 0.2 * len(words)
