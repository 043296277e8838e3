"""The version and the address of pyproject.toml, written wherever else they stand.

That is what stands first in every notebook, and LINES. `make front` runs this: it writes all of
them anew, and names what it changed.
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

LINES = (  # files, and in each the one text to keep right: what is before, the value, what is after
    ("crt_lib/__init__.py", r'(?m)(^__version__ = ")([^"]*)(")', "version"),
    ("CITATION.cff", r"(?m)(^version: )(.*)()$", "version"),
    ("CITATION.cff", r"(?m)(^repository-code: )(.*)()$", "url"),
    ("docs/usage.md", r'("crt-lm @ git\+)([^"]*)(")', "url"),
)


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
    """The files of the checkout `root` that say another version or address, as they should be.

    Raises InputError where a file of LINES does not say it exactly once.
    """
    address = Address.read(root)
    anew = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        old = json.loads(path.read_text(encoding="utf-8"))
        new = with_front(old, path.stem, address)
        if new != old:
            if not new["cells"][2]["outputs"]:
                lines = _printed(root, address).splitlines(keepends=True)
                said = {"name": "stdout", "output_type": "stream", "text": lines}
                new["cells"][2]["outputs"] = [said]
            anew[path] = json.dumps(new, indent=1, ensure_ascii=False) + "\n"
    texts = {name: (root / name).read_text(encoding="utf-8") for name, _, _ in LINES}
    right = dict(texts)
    for name, pattern, field in LINES:
        value = getattr(address, field)
        right[name], found = re.subn(pattern, rf"\g<1>{value}\g<3>", right[name])
        if found != 1:
            raise InputError(f"{root / name} has {found} places for the {field}; one is needed")
    return anew | {root / name: text for name, text in right.items() if text != texts[name]}


def _printed(root: Path, address: Address) -> str:
    """What the set-up cell prints in this checkout, once `__version__` is the address's."""
    words = [sys.executable, "-c", "from crt_lib.book.start import start; start()"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    said = subprocess.check_output(words, cwd=root / "notebooks", env=environment, text=True)
    return re.sub(r"^crt_lib \S+", f"crt_lib {address.version}", said)


if __name__ == "__main__":
    for path, text in changed(Path(__file__).resolve().parents[1]).items():
        write_text(path, text)
        print(path)
