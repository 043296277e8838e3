"""The numbered notebooks: their order, their declared parameters, and checks of given values."""

import ast
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, sha256

_CHECKED: dict[str, Any] = {"str": str, "int": int, "float": int | float, "bool": bool}
_WORDS = {"true": "True", "false": "False", "none": "None"}


@dataclass(frozen=True)
class Notebook:
    """A notebook `NN_name.ipynb` and what its cell tagged `parameters` declares."""

    path: Path
    name: str  # of the file without its suffix, as in `01_data`
    parameters: dict[str, str]  # name -> declared type, as written: "int", "list[int]", ...
    source_sha256: str  # of the cells' types, tags and sources: outputs do not change it
    n_cells: int
    after: tuple[str, ...]  # names of those whose results it reads: metadata crt.after

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        """Read a notebook; raises InputError if it is not one or its parameters do not parse."""
        declared: dict[str, str] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cells = [
                (cell["cell_type"], cell["metadata"].get("tags", []), "".join(cell["source"]))
                for cell in content["cells"]
            ]
            for _, tags, source in cells:
                for line in ast.parse(source).body if "parameters" in tags else ():
                    if isinstance(line, ast.AnnAssign):
                        declared[ast.unparse(line.target)] = ast.unparse(line.annotation)
        except (OSError, ValueError, KeyError, TypeError, SyntaxError, RecursionError) as error:
            raise InputError(f"{path} is not a notebook that can be read: {error!r}") from error
        after = content.get("metadata", {}).get("crt", {}).get("after", [])
        source = sha256(json.dumps(cells).encode())
        return cls(path, path.stem, declared, source, len(cells), tuple(after))

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `given`, values or text, that it declares, as it declares them.

        Raises InputError for a value that does not fit.
        """
        found = {}
        for name, kind in self.parameters.items():
            if name in given:
                try:
                    found[name] = convert(given[name], kind)
                except ValueError:
                    raise InputError(
                        f"parameter {name} is {given[name]!r}, but {self.name} declares it as "
                        f"{kind}. Give a value of that type."
                    ) from None
        return found


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
    names = {p: (p.name, p.stem, *p.stem.split("_", 1)) for p in paths}
    if unknown := [name for name in only if not any(name in of for of in names.values())]:
        allowed = ", ".join(p.stem for p in paths)
        raise InputError(f"unknown notebook {unknown[0]!r}; choose among {allowed}")
    return [Notebook.read(p) for p in paths if not only or set(only).intersection(names[p])]


def as_html(notebook: Any, title: str) -> str:
    """A notebook, as nbformat reads it, with its outputs as a page."""
    from nbconvert import HTMLExporter

    return HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def convert(value: Any, kind: str) -> Any:
    """`value` as the declared type: str, int, float or bool; values of others are not checked.

    Text is read as a Python literal where `kind` is not str. Raises ValueError if it does not fit.
    """
    if isinstance(value, str) and kind != "str":
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(_WORDS.get(value.lower(), value))
    wanted = _CHECKED.get(kind, object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind in ("int", "float")):
        raise ValueError(f"{value!r} is not {kind}")
    return float(value) if kind == "float" else value
