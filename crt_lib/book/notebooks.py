"""The numbered notebooks: their order, their declared parameters, and checks of given values."""

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, sha256

_SIMPLE = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}


@dataclass(frozen=True)
class Notebook:
    """A notebook `NN_name.ipynb` and what its cell tagged `parameters` declares."""

    path: Path
    parameters: dict[str, str]  # name -> declared type, as written: "int", "float | None", ...
    source_sha256: str  # of the cells' types, tags and sources: outputs do not change it
    after: tuple[str, ...] = ()  # names of those whose results it reads: metadata crt.after

    @property
    def name(self) -> str:
        """The file's name without its suffix, as in `01_data`."""
        return self.path.stem

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        """Read a notebook; raises InputError if it is not one or its parameters do not parse."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cells = content["cells"]
            sources = [
                (cell["cell_type"], cell["metadata"].get("tags", []), "".join(cell["source"]))
                for cell in cells
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a notebook that can be read: {error!r}") from error
        declared: dict[str, str] = {}
        for kind, tags, source in sources:
            if kind == "code" and "parameters" in tags:
                try:
                    declared.update(_declared(source))
                except SyntaxError as error:
                    raise InputError(
                        f"the parameters cell of {path} is not plain Python assignments: {error}"
                    ) from error
        after = content.get("metadata", {}).get("crt", {}).get("after", [])
        return cls(path, declared, sha256(json.dumps(sources).encode()), tuple(after))


def find_notebooks(folder: Path, only: Sequence[str] = ()) -> list[Notebook]:
    """The notebooks `NN_name.ipynb` of `folder` in order, or those that `only` names.

    A name is `01_data`, `01_data.ipynb`, `01` or `data`. Raises InputError for an unknown one and
    for a folder without notebooks.
    """
    paths = sorted(p for p in folder.glob("*.ipynb") if re.fullmatch(r"\d\d_\w+", p.stem))
    if not paths:
        raise InputError(
            f"no notebooks NN_name.ipynb in {folder}. Run from a checkout of the project, or name "
            "the folder that holds them."
        )
    chosen = set()
    for name in only:
        stem = name.removesuffix(".ipynb")
        found = [p for p in paths if stem in (p.stem, *p.stem.split("_", 1))]
        if not found:
            allowed = ", ".join(p.stem for p in paths)
            raise InputError(f"unknown notebook {name!r}; choose among {allowed}")
        chosen.update(found)
    return [Notebook.read(p) for p in paths if not only or p in chosen]


def check_parameters(
    notebooks: Iterable[Notebook], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The given parameters of each notebook by its name, converted to the declared types.

    A value may be text, as a command line gives it. A parameter goes to the notebooks that declare
    it. Raises InputError for one that none declares and for a value that does not fit.
    """
    notebooks = list(notebooks)
    known = sorted({name for notebook in notebooks for name in notebook.parameters})
    for name in given:
        if name not in known:
            raise InputError(
                f"unknown parameter {name!r}; the notebooks to run declare "
                f"{', '.join(known) or 'none'}. See the cell tagged `parameters` of each."
            )
    checked: dict[str, dict[str, Any]] = {}
    for notebook in notebooks:
        checked[notebook.name] = {}
        for name, value in given.items():
            if name in notebook.parameters:
                kind = notebook.parameters[name]
                try:
                    checked[notebook.name][name] = convert(value, kind)
                except ValueError:
                    raise InputError(
                        f"parameter {name} is {value!r}, but {notebook.name} declares it as "
                        f"{kind}. Give a value of that type."
                    ) from None
    return checked


def convert(value: Any, kind: str) -> Any:
    """`value` as the declared type `kind`, an annotation such as `int` or `list[int] | None`.

    Text is read as a literal where `kind` is not text. Raises ValueError if it does not fit.
    """
    annotation = ast.parse(kind, mode="eval").body
    candidates = [value]
    if isinstance(value, str):
        # "3" given for a `str | int` is the number; for a `str` it stays the text it is.
        candidates = [literal for literal in [_literal(value)] if not isinstance(literal, str)]
        candidates.append(value)
    for candidate in candidates:
        if _fits(candidate, annotation):
            wants_float = isinstance(annotation, ast.Name) and annotation.id == "float"
            return float(candidate) if wants_float else candidate
    raise ValueError(f"{value!r} is not {kind}")


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text


def _fits(value: Any, annotation: ast.expr) -> bool:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id=name) if name in _SIMPLE:
            return isinstance(value, _SIMPLE[name])
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            elements = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return value in [ast.literal_eval(element) for element in elements]
        case ast.Subscript(value=ast.Name(id="list"), slice=element):
            return isinstance(value, list) and all(_fits(item, element) for item in value)
        case ast.Subscript(value=ast.Name(id="dict")):
            return isinstance(value, dict)
    raise ValueError(f"the type {ast.unparse(annotation)} is not one a parameter can have")


def _declared(source: str) -> dict[str, str]:
    declared = {}
    for statement in ast.parse(source).body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                declared[name] = ast.unparse(annotation)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                declared[name] = "None" if value is None else type(value).__name__
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.List()):
                declared[name] = "list"
    return declared
