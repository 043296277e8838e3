"""`make docs`: pages, notebooks and API of a checkout as a folder of HTML, its links checked.

    python -m crt_lib.book.site site

Notebooks are shown with the outputs that they are committed with. Nothing is fetched.
"""

import ast
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from crt_lib.files import InputError, write_text
from crt_lib.show.address import Address

PAGES = ("*.md", "docs/*.md", "results/*.md", "notebooks/*.md")
_LINK = re.compile(r'\b(href|src)="([^"]+)"')
_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
td, th {{ border: 1px solid #bbb; padding: .2rem .5rem; text-align: left; }}
pre, code {{ background: #f3f3f3; }} pre {{ padding: .5rem; overflow-x: auto; }}
img {{ max-width: 100%; }} a.anchor-link {{ display: none; }}
</style></head><body>
{body}
</body></html>
"""


def build(root: Path, site: Path) -> int:
    """Make `site` anew from the checkout `root`; returns its number of HTML pages.

    Raises InputError where a local link of it leads nowhere, and where `site` holds something else.
    """
    _make_room(site)
    sources = sorted(path for pattern in PAGES for path in root.glob(pattern))
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    shown = {path.relative_to(root).as_posix() for path in [*sources, *notebooks]}
    for path in sources:
        _write(_page(path.read_text(encoding="utf-8")), path.relative_to(root), root, site, shown)
    for path in notebooks:
        _write(_notebook(path), path.relative_to(root), root, site, shown)
    write_text(site / "index.html", _page(_index(root, sources, notebooks)))
    _api(root, site / "api")
    if broken := broken_links(site):
        raise InputError("links that lead nowhere:\n" + "\n".join(broken))
    return len(list(site.rglob("*.html")))


def broken_links(site: Path) -> list[str]:
    """`PAGE: LINK` of each link between files of `site` whose file or whose anchor is missing."""
    pages = {path.resolve(): _Page(path) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            inside = to.is_relative_to(site.resolve()) and to.is_file()
            anchor = unquote(parts.fragment)
            if not inside or (anchor and to in pages and anchor not in pages[to].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


class _Page(HTMLParser):
    """The links of a page, and the anchors that links can lead to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def _make_room(site: Path) -> None:
    if site.is_dir() and any(site.iterdir()) and not (site / "index.html").is_file():
        raise InputError(f"{site} holds something that is not a site; name another folder")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)


def _page(text: str) -> str:
    """A page of markdown as HTML."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    return _FRAME.format(title=escape(_title(text)), body=markdown2html_mistune(text))


def _notebook(path: Path) -> str:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_filename(str(path))
    return str(body)


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else "CRT"


def _write(html: str, source: Path, root: Path, site: Path, shown: set[str]) -> None:
    """The HTML of `source`: links to what is shown lead to its HTML, other files come along."""

    def relinked(match: re.Match[str]) -> str:
        parts = urlsplit(match[2])
        if parts.scheme or parts.netloc or not parts.path:
            return match[0]
        to = (root / source.parent / unquote(parts.path)).resolve()
        if not (to.is_file() and to.is_relative_to(root.resolve())):
            return match[0]
        name = to.relative_to(root.resolve())
        if name.as_posix() not in shown:
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(to, site / name)
            return match[0]
        path = PurePosixPath(parts.path).with_suffix(".html")
        return f'{match[1]}="{parts._replace(path=str(path)).geturl()}"'

    write_text(site / source.with_suffix(".html"), _LINK.sub(relinked, html))


def _index(root: Path, sources: list[Path], notebooks: list[Path]) -> str:
    """The first page, as markdown."""
    address = Address.read(root)
    lines = [f"# CRT {address.version}", "", f"The repository: <{address.url}>"]
    for heading, paths in (("Pages", sources), ("Notebooks", notebooks)):
        lines += ["", f"## {heading}", ""]
        for path in paths:
            text = path.read_text(encoding="utf-8")
            title = _title(_first_cell(text) if path.suffix == ".ipynb" else text)
            to = path.relative_to(root).with_suffix(".html").as_posix()
            lines.append(f"- [{title}]({to})")
    lines += ["", "## API", "", "- [crt_lib](api/crt_lib.html): the names to start with"]
    for name, said in _modules(root).items():
        lines.append(f"- [{name}](api/{name.replace('.', '/')}.html): {said}")
    return "\n".join(lines)


def _modules(root: Path) -> dict[str, str]:
    """The core's modules, then the rooms, each with the first line of its docstring."""
    package = root / "crt_lib"
    core = {path.stem: path for path in package.glob("[!_]*.py")}
    rooms = {path.parent.name: path for path in package.glob("*/__init__.py")}
    said = {}
    for name, path in [*sorted(core.items()), *sorted(rooms.items())]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        said[f"crt_lib.{name}"] = text.partition("\n")[0]
    return said


def _first_cell(text: str) -> str:
    import nbformat

    return str(nbformat.reads(text, as_version=4).cells[0].source)


def _api(root: Path, folder: Path) -> None:
    if not find_spec("pdoc"):
        raise InputError("pdoc is not installed; `make docs` installs it: the extra `docs`")
    source = f"crt_lib={Address.read(root).url}/blob/main/crt_lib/"
    words = ["--output-directory", str(folder.resolve()), "--edit-url", source]
    # By itself pdoc follows `__all__`, whose names are functions: the modules are given to it.
    asked = ["crt_lib", r"!crt_lib\.", *_modules(root)]
    subprocess.run([sys.executable, "-m", "pdoc", *words, *asked], cwd=root, check=True)


def main() -> None:
    """Build the folder that is named, of the checkout that this module belongs to."""
    root, site = Path(__file__).resolve().parents[2], Path(sys.argv[1])
    try:
        print(f"{build(root, site)} pages, all links between them lead somewhere: {site}")
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
