"""What stands first in every notebook, and the citation's address, written from pyproject.toml.

`python -m crt_lib.book.front` writes both anew, and names what it changed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, write_text
from crt_lib.runs.manifest import checkout_root
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

    Raises InputError where its title is not followed by a text cell `## Set-up` and a code cell.
    """
    cells = [dict(cell) for cell in notebook["cells"]]
    sources = ["".join(cell["source"]) for cell in cells[:3]]
    kinds = [cell["cell_type"] for cell in cells[:3]]
    if kinds != ["markdown", "markdown", "code"] or not sources[1].startswith("## Set-up"):
        raise InputError(f"{name} needs a title, a text cell `## Set-up` and its code cell first")
    title = sources[0].partition("\n\n")[2] if sources[0].startswith("[![") else sources[0]
    anew = (f"{badges(address, name)}\n\n{title}", *set_up(address))
    for cell, old, new in zip(cells, sources, anew, strict=False):
        if new != old:
            cell["source"] = new.splitlines(keepends=True)
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
            if not new["cells"][2]["outputs"]:
                lines = _printed(root).splitlines(keepends=True)
                said = {"name": "stdout", "output_type": "stream", "text": lines}
                new["cells"][2]["outputs"] = [said]
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


if __name__ == "__main__":
    for path, text in changed(checkout_root()).items():
        write_text(path, text)
        print(path)
