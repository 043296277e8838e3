"""`make docs`: pages, notebooks and API of a checkout as a folder of HTML, its links checked.

Notebooks are shown with the outputs that they are committed with. A run whose traces are stored has
its exit explorer there. Nothing is fetched.
"""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from crt_lib.book.notebooks import as_html
from crt_lib.files import InputError, write_text
from crt_lib.show.address import Address
from crt_lib.show.explorer_page import Explored, page_of
from crt_lib.study.analysis import analyse

SHOWN = ("*.md", "docs/*.md", "results/*.md", "notebooks/*.md", "notebooks/*.ipynb")
_LINK = re.compile(r'\b(href|src)="([^"]+)"')


def build(root: Path, site: Path) -> int:
    """Make `site` anew from the checkout `root`; returns its number of HTML pages.

    Raises InputError where a local link of it leads nowhere, and where `site` holds something else.
    """
    if site.is_dir() and any(site.iterdir()) and not (site / "index.html").is_file():
        raise InputError(f"{site} holds something that is not a site; name another folder")
    shutil.rmtree(site, ignore_errors=True)
    root = root.resolve()
    shown = {path: _read(path) for kind in SHOWN for path in sorted(root.glob(kind))}
    for path, page in shown.items():
        html = _relinked(as_html(page, _title(page)), path, root, site, shown)
        write_text(site / path.relative_to(root).with_suffix(".html"), html)
    index = _page(_index(root, shown, _explorers(root, site)))
    write_text(site / "index.html", as_html(index, _title(index)))
    _api(root, site / "api")
    if broken := broken_links(site):
        raise InputError("links that lead nowhere:\n" + "\n".join(broken))
    return len(list(site.rglob("*.html")))


def broken_links(site: Path) -> list[str]:
    """`PAGE: LINK` of each link between files of `site` whose file or whose anchor is missing."""
    site = site.resolve()
    found = {path: _links_and_anchors(path) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, link in ((path, link) for path, (links, _) in found.items() for link in links):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        if not parts.path and path.is_relative_to(site / "api"):
            continue  # pdoc links a class to its private base, which it does not show
        to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        anchor = unquote(parts.fragment)
        _, anchors = found.get(to, ([], {anchor}))
        if not (to.is_relative_to(site) and to.is_file() and anchor in anchors):
            broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def _links_and_anchors(path: Path) -> tuple[list[str], set[str]]:
    """The links of a page, and what links into it can name."""
    from bs4 import BeautifulSoup

    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")

    def values(*kinds: str) -> list[str]:
        return [str(tag[k]) for k in kinds for tag in page.select(f"[{k}]") if tag[k]]

    return values("href", "src"), {"", *values("id", "name")}


def _read(path: Path) -> Any:
    """A notebook, or a page of markdown as one."""
    import nbformat

    return nbformat.read(path, 4) if path.suffix == ".ipynb" else _page(path.read_text("utf-8"))


def _page(text: str) -> Any:
    from nbformat import v4

    return v4.new_notebook(cells=[v4.new_markdown_cell(text)])


def _title(page: Any) -> str:
    found = re.search(r"^# (.+)$", page.cells[0].source, re.MULTILINE)
    return found[1] if found else "CRT"


def _relinked(html: str, source: Path, root: Path, site: Path, shown: dict[Path, Any]) -> str:
    """The HTML of `source`: links to what is shown lead to its HTML, other files come along."""

    def relink(match: re.Match[str]) -> str:
        parts = urlsplit(match[2])
        to = (source.parent / unquote(parts.path)).resolve()
        if parts.scheme or parts.netloc or not (to.is_file() and to.is_relative_to(root)):
            return match[0]
        if to in shown:
            path = PurePosixPath(parts.path).with_suffix(".html")
            return f'{match[1]}="{parts._replace(path=str(path)).geturl()}"'
        copy = site / to.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(to, copy)
        return match[0]

    return _LINK.sub(relink, html)


def _explorers(root: Path, site: Path) -> list[Path]:
    """The pages of `crt explore` of the runs with traces, from the root."""
    runs = [path.parents[1] for path in sorted(root.glob("results/*/*/traces/test.safetensors"))]
    made = [run.relative_to(root) / "explorer.html" for run in runs]
    for run, path in zip(runs, made, strict=True):
        write_text(site / path, page_of(Explored.of(analyse(run))))
    return made


def _index(root: Path, shown: dict[Path, Any], explorers: list[Path]) -> str:
    """The first page, as markdown."""
    address = Address.read(root)
    pages = {path.relative_to(root).with_suffix(".html"): _title(p) for path, p in shown.items()}
    pages |= {path: f"The exit explorer of {path.parent.as_posix()}" for path in explorers}
    links = [f"- [{title}]({path.as_posix()})" for path, title in pages.items()]
    api = [f"- [{name}](api/{name.replace('.', '/')}.html)" for name in _modules(root)]
    first = [f"# CRT {address.version}", "", f"The repository: <{address.url}>", ""]
    return "\n".join([*first, "## Pages and notebooks", "", *links, "", "## API", "", *api])


def _modules(root: Path) -> list[str]:
    """The package, the core's modules, then the rooms."""
    folder = root / "crt_lib"
    core = sorted(path.stem for path in folder.glob("[!_]*.py"))
    rooms = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    return ["crt_lib", *(f"crt_lib.{name}" for name in core + rooms)]


def _api(root: Path, folder: Path) -> None:
    if not find_spec("pdoc"):
        raise InputError("pdoc is not installed; `make docs` installs it: the extra `docs`")
    source = f"crt_lib={Address.read(root).url}/blob/main/crt_lib/"
    words = ["--output-directory", str(folder.resolve()), "--edit-url", source]
    # By itself pdoc follows `__all__`, whose names are functions: the modules are given to it.
    package, *modules = _modules(root)
    asked = [package, r"!crt_lib\.", *modules]
    subprocess.run([sys.executable, "-m", "pdoc", *words, *asked], cwd=root, check=True)


if __name__ == "__main__":
    try:
        pages = build(Path(__file__).resolve().parents[1], Path(sys.argv[1]))
        print(f"{pages} pages, all links between them lead somewhere: {sys.argv[1]}")
    except InputError as error:
        sys.exit(f"error: {error}")
