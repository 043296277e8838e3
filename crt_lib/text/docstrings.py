"""English prose from the docstrings of the installed numpy, pandas and matplotlib.

Real text with no download. The sources are read with `ast`; none of the packages is imported.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

from crt_lib.files import InputError, cache_root, sha256, write_json

PACKAGES = ("numpy", "pandas", "matplotlib")
SPLITS = ("train", "valid", "test")

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


def collect() -> tuple[dict[str, str], dict[str, str]]:
    """The text of every split and the version of every package, `(texts, versions)`.

    A paragraph is one line and a docstring ends with a blank line. Modules are dealt to the splits
    by a hash of their name, about 80/10/10; a paragraph found in several places is kept at the
    first, train before valid before test. Kept under `cache_root()`, keyed by the versions and by
    this file. Raises InputError when a package is missing.
    """
    versions = {package: _version(package) for package in PACKAGES}
    rule = sha256(Path(__file__).read_bytes())
    key = sha256(json.dumps([versions, rule]).encode())
    path = cache_root() / "docstrings" / f"{key[:32]}.json"
    texts = _read_cache(path)
    if texts is None:
        texts = _collect(versions)
        write_json(path, {"texts": texts, "sha256": _digest(texts)})
    return texts, versions


def prose(docstring: str) -> list[str]:
    """The paragraphs of running English in a docstring, each on one line, markup removed.

    Doctests, code, tables, headings, directives and the names and types of parameter lists are
    left out; what is said about a parameter stays where it is made of sentences.
    """
    paragraphs = (_plain(lines) for lines in _blocks(inspect.cleandoc(docstring)))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"corpus 'docstrings' reads {', '.join(PACKAGES)}, and {package} is not installed; "
            "install the notebook extra: pip install 'crt-lm[notebooks]'"
        ) from error


def _read_cache(path: Path) -> dict[str, str] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        texts = {split: stored["texts"][split] for split in SPLITS}
        return texts if stored["sha256"] == _digest(texts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: collected anew


def _digest(texts: dict[str, str]) -> str:
    return sha256(json.dumps([texts[split] for split in SPLITS]).encode())


def _collect(versions: dict[str, str]) -> dict[str, str]:
    modules = [module for package in versions for module in _modules(package)]
    seen: set[str] = set()
    texts = {}
    for split in SPLITS:
        documents = []
        for name, path in modules:
            if _split_of(name) != split:
                continue
            for docstring in _docstrings(path):
                paragraphs = [p for p in prose(docstring) if _first_time(p, seen)]
                if paragraphs:
                    documents.append("\n".join(paragraphs) + "\n\n")
        texts[split] = "".join(documents)
    return texts


def _first_time(paragraph: str, seen: set[str]) -> bool:
    letters = re.sub(r"[^a-z]+", " ", paragraph.lower()).strip()
    if letters in seen:
        return False
    seen.add(letters)
    return True


def _split_of(module: str) -> str:
    tenth = int(sha256(f"docstrings:{module}".encode())[:16], 16) % 10
    return {0: "valid", 1: "test"}.get(tenth, "train")


def _modules(package: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the installed {package} has no source folder; install it again with pip")
    root = Path(spec.submodule_search_locations[0])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts):
            found.append((".".join((package, *parts)), path))
    return sorted(found)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a template, not a module
    yield from _docstrings_of(tree)


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    # statements alone are visited: expressions are most of a tree and hold no docstring
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
    elif isinstance(node, ast.Expr):
        call = node.value
        if isinstance(call, ast.Call) and _name(call.func).startswith("add_newdoc"):
            # numpy documents its C functions by calls that pass the docstring
            for value in ast.walk(call):
                if isinstance(value, ast.Constant) and "\n" in str(value.value):
                    yield str(value.value)
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            yield from _docstrings_of(child)


def _name(function: ast.expr) -> str:
    return getattr(function, "id", "") or getattr(function, "attr", "")


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
        elif body and not (directive or _is_heading(body, following.strip())):
            if bullet:
                body = body[bullet.end() :]
                indent = depth + bullet.end()
            block.append(body)
            if body.endswith("::"):
                skip_deeper_than = depth
    if block:
        yield block


def _is_heading(line: str, following: str) -> bool:
    return bool(_UNDERLINE.fullmatch(line) or _UNDERLINE.fullmatch(following))


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
