"""What stands first in every notebook, and the citation's address, written from pyproject.toml.

    python -m crt_lib.book.front

writes the badges, the set-up cell and the line of CITATION.cff anew, and names what it changed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, write_text
from crt_lib.show.address import Address

_COLAB = "https://colab.research.google.com/assets/colab-badge.svg"
_NBVIEWER = "https://raw.githubusercontent.com/jupyter/design/main/logos/Badges/nbviewer_badge.svg"
_TEXT = """\
## Set-up

Takes `crt_lib` as it is installed, from the checkout around this notebook, or from the wheel
`{wheel}` beside it. Where there is none of them, as in Colab, it fetches the
tagged version with its stored results. Your torch, numpy and ipywidgets stay as they are."""
_CODE = """\
import importlib.util
import sys

sys.path += ["..", "{wheel}"]  # a checkout, a wheel
if not importlib.util.find_spec("crt_lib"):
    !curl -fsSL {archive} | tar xzf -
    sys.path.append("{folder}")
importlib.import_module("crt_lib.book.start").start()  # nbval-ignore-output: versions"""


def badges(address: Address, notebook: str) -> str:
    """The line of links above the title of `notebook`, such as `01_data`."""
    colab = f"[![Open in Colab]({_COLAB})]({address.colab(notebook)})"
    return f"{colab} [![View in nbviewer]({_NBVIEWER})]({address.nbviewer(notebook)})"


def set_up(address: Address) -> tuple[str, str]:
    """The text and the code of the set-up cells, the same in every notebook."""
    names = {"wheel": address.wheel, "archive": address.archive, "folder": address.folder}
    return _TEXT.format(**names), _CODE.format(**names)


def with_front(notebook: dict[str, Any], name: str, address: Address) -> dict[str, Any]:
    """The notebook with its badges and set-up cells made anew, without the output of a changed one.

    Raises InputError where it has no text cell `## Set-up` with a code cell after it.
    """
    cells = [dict(cell) for cell in notebook["cells"]]
    first, *others = ("".join(cell["source"]) for cell in cells)
    at = [n for n, source in enumerate(others, start=1) if source.startswith("## Set-up")]
    if len(at) != 1 or [cell["cell_type"] for cell in cells[at[0] :][:2]] != ["markdown", "code"]:
        raise InputError(f"{name} needs one text cell `## Set-up`, and its code cell after it")
    title = first.partition("\n\n")[2] if first.startswith("[![") else first
    anew = (f"{badges(address, name)}\n\n{title}", *set_up(address))
    for cell, source in zip((cells[0], *cells[at[0] :]), anew, strict=False):
        if "".join(cell["source"]) != source:
            cell["source"] = source.splitlines(keepends=True)
            if cell["cell_type"] == "code":
                cell["outputs"] = []
    return notebook | {"cells": cells}


def changed(root: Path) -> dict[Path, str]:
    """The files of the checkout `root` that do not say the address as they should, made anew."""
    address = Address.read(root)
    anew = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        old = json.loads(path.read_text(encoding="utf-8"))
        new = with_front(old, path.stem, address)
        if new != old:
            for cell in new["cells"]:
                if cell.get("outputs") == [] and "book.start" in "".join(cell["source"]):
                    lines = _printed(root).splitlines(keepends=True)
                    cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}]
            anew[path] = json.dumps(new, indent=1, ensure_ascii=False) + "\n"
    path = root / "CITATION.cff"
    text = path.read_text(encoding="utf-8")
    cited, found = re.subn(r"(?m)^repository-code: .*$", f"repository-code: {address.url}", text)
    if found != 1:
        raise InputError(f"{path} has {found} lines `repository-code: ...`; one is needed")
    return anew | ({path: cited} if cited != text else {})


def _printed(root: Path) -> str:
    """What the set-up cell prints in this checkout."""
    words = [sys.executable, "-c", "from crt_lib.book.start import start; start()"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.check_output(words, cwd=root / "notebooks", env=environment, text=True)


def main() -> None:
    """Write anew what differs in the checkout that this module belongs to."""
    root = Path(__file__).resolve().parents[2]
    for path, text in changed(root).items():
        write_text(path, text)
        print(path.relative_to(root))


if __name__ == "__main__":
    main()
