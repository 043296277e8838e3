"""One version and one address, in every place; the set-up cell finds `crt_lib` wherever it is."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from make_front import badges, changed, set_up, with_front

from crt_lib.files import InputError
from crt_lib.show.address import Address

ROOT = Path(__file__).parents[2]
ADDRESS = Address.read(ROOT)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAYS_IT = ("notebooks", "pyproject.toml", "crt_lib", "CITATION.cff", "docs")

# The cell as a kernel runs it, but where no crt_lib is installed.
DRIVER = """
import sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
sys.path[:] = ["", *(p for p in sys.path if p and not (Path(p) / "crt_lib").is_dir())]
sys.path.append(sys.argv[2])
shell = InteractiveShell.instance()
for source in [sys.argv[1]] * int(sys.argv[3]):
    shell.run_cell(source).raise_error()
import crt_lib
print("crt_lib in", Path(crt_lib.__file__).resolve().parent, "at", Path.cwd())
"""
# In place of curl: answers at the one address with `archive`, if there is one.
CURL = f"""#!/bin/sh
test "$2" = "{ADDRESS.archive}" && cat "$(dirname "$0")/archive" && exit
echo "curl: (6) Could not resolve host" >&2
exit 6
"""
# In place of pip: keeps what it was asked for, and unpacks or copies it into `site`.
PIP = """
import shutil, sys, zipfile
from pathlib import Path
here = Path(__file__).resolve().parents[1]
(here / "asked.txt").write_text(" ".join(sys.argv[1:]))
(source,) = [Path(word) for word in sys.argv[1:] if Path(word).is_absolute()]
if source.is_file():
    zipfile.ZipFile(source).extractall(here / "site")
else:
    shutil.copytree(source / "crt_lib", here / "site" / "crt_lib")
"""


def copy_of_the_checkout(folder: Path) -> Path:
    for name in SAYS_IT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture
def desk(tmp_path):
    """A folder to open a notebook in, and beside it stand-ins for curl and pip."""
    (tmp_path / "tools" / "pip").mkdir(parents=True)
    (tmp_path / "tools" / "pip" / "__init__.py").touch()
    (tmp_path / "tools" / "pip" / "__main__.py").write_text(PIP)
    (tmp_path / "tools" / "curl").write_text(CURL)
    (tmp_path / "tools" / "curl").chmod(0o755)
    (tmp_path / "tools" / "site").mkdir()
    (tmp_path / "home" / "desk").mkdir(parents=True)
    return tmp_path / "home" / "desk"


def open_notebook(desk: Path, times: int = 1) -> subprocess.CompletedProcess:
    """Run the set-up cell in `desk`."""
    tools = next(p / "tools" for p in desk.parents if (p / "tools").is_dir())
    changes = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tools),
        "PIP_DRY_RUN": "1",  # should the stand-in not be found, nothing is installed
        "IPYTHONDIR": str(tools / "ipython"),
    }
    _, code = set_up(ADDRESS)
    words = [sys.executable, "-c", DRIVER, code, str(tools / "site"), str(times)]
    environment = os.environ | changes
    environment.pop("VIRTUAL_ENV", None)  # IPython would look there for packages
    return subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True)


def pack(path: Path) -> None:
    """A wheel, as far as an import needs one."""
    with zipfile.ZipFile(path, "w") as wheel:
        for source in (ROOT / "crt_lib").rglob("*.py"):
            wheel.write(source, source.relative_to(ROOT))


def test_every_place_says_version_and_address():
    said = [str(path.relative_to(ROOT)) for path in changed(ROOT)]
    assert not said, "run `make front`"


def test_the_set_up_cell_is_short_and_the_same_everywhere():
    text, code = set_up(ADDRESS)
    assert len(code.splitlines()) <= 8
    for path in NOTEBOOKS:
        sources = ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"]]
        assert sources[1:3] == [text, code], path.name
        assert sources[0].startswith(badges(ADDRESS, path.stem) + "\n\n# "), path.name


def test_another_version_and_address_reach_every_place(tmp_path):
    root = copy_of_the_checkout(tmp_path)
    path = root / "pyproject.toml"
    bumped = path.read_text().replace(ADDRESS.url, "https://github.com/some/where")
    path.write_text(bumped.replace(f'version = "{ADDRESS.version}"', 'version = "7.8.9"'))
    anew = changed(root)
    places = {"CITATION.cff", "__init__.py", "usage.md"}
    assert {file.name for file in anew} == places | {p.name for p in NOTEBOOKS}
    for file, new in anew.items():
        old = file.read_text(encoding="utf-8")
        if file.suffix == ".ipynb":
            assert "where/archive/v7.8.9.tar.gz" in new and "crt_lm-7.8.9-" in new
            assert json.loads(new)["cells"][3:] == json.loads(old)["cells"][3:]
            (said,) = json.loads(new)["cells"][2]["outputs"]
            assert said["text"][0].startswith("crt_lib 7.8.9 (checkout at ..)")
        file.write_text(new, encoding="utf-8")
    assert not changed(root)
    # Nothing is left that says the old ones: no place was forgotten in `make_front.LINES`.
    texts = {".py", ".md", ".cff", ".toml", ".ipynb"}
    for file in (file for file in root.rglob("*") if file.suffix in texts):
        text = file.read_text(encoding="utf-8")
        assert ADDRESS.url not in text, file
        assert not re.search(rf"(?<![\w.=]){re.escape(ADDRESS.version)}(?![\w.])", text), file
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["repository-code"]) == (
        "7.8.9",
        "https://github.com/some/where",
    )
    words = [sys.executable, "-c", "import crt_lib; print(crt_lib.__version__, crt_lib.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    said = subprocess.check_output(words, cwd=root, env=environment, text=True)
    assert said.split() == ["7.8.9", str(root / "crt_lib/__init__.py")]


@pytest.mark.parametrize("lines", ["", "version: 1\nversion: 2\n"])
def test_a_place_that_is_lost_or_double_is_refused(tmp_path, lines):
    root = copy_of_the_checkout(tmp_path)
    (root / "CITATION.cff").write_text(f"{lines}repository-code: x\n")
    with pytest.raises(InputError, match=r"has \d places for the version; one is needed"):
        changed(root)


def test_a_notebook_without_a_set_up_cell_is_refused():
    cells = [{"cell_type": "markdown", "source": ["# A title"], "metadata": {}}]
    with pytest.raises(InputError, match="99_new needs a title, a text cell `## Set-up`"):
        with_front({"cells": cells}, "99_new", ADDRESS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["KeyError", "Repository"]),
        ("[project", ["pyproject.toml gives no address"]),
        (
            '[project]\nversion = "1"\nurls.Repository = "https://x.org/crt"',
            ["https://x.org/crt", "https://github.com/"],
        ),
    ],
)
def test_an_address_that_is_missing_or_of_another_kind_is_refused(tmp_path, text, words):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        Address.read(tmp_path)
    assert all(word in str(caught.value) for word in words)


def test_a_checkout_around_the_notebook_is_used(desk):
    for name in ("crt_lib", "pyproject.toml"):
        (desk.parent / name).symlink_to(ROOT / name)
    done = open_notebook(desk)
    assert done.returncode == 0, done.stderr
    line, where = done.stdout.splitlines()
    assert f"crt_lib {ADDRESS.version} (checkout at " in line and "stored results in" in line
    assert where == f"crt_lib in {ROOT / 'crt_lib'} at {desk}"
    assert not (desk.parents[1] / "tools" / "asked.txt").exists()


def test_a_wheel_beside_the_notebook_is_installed(desk):
    pack(desk / ADDRESS.wheel)
    done = open_notebook(desk)
    assert done.returncode == 0, done.stderr
    line, where = done.stdout.splitlines()
    assert f"(installed from {ADDRESS.wheel})" in line
    assert line.endswith("no stored results here")
    tools = desk.parents[1] / "tools"
    assert where == f"crt_lib in {tools / 'site' / 'crt_lib'} at {desk}"
    asked = (tools / "asked.txt").read_text().split()
    assert asked[:3] == ["install", "--quiet", str(desk / ADDRESS.wheel)]
    assert {word.partition("==")[0] for word in asked[3:]} == {"torch", "numpy", "ipywidgets"}


def test_elsewhere_the_tagged_version_is_fetched_and_its_results_are_at_hand(desk):
    tools = desk.parents[1] / "tools"
    with tarfile.open(tools / "archive", "w:gz") as archive:
        for name in ("crt_lib", "pyproject.toml", "notebooks/glossary.md", "results/README.md"):
            archive.add(ROOT / name, f"{ADDRESS.folder}/{name}")
    done = open_notebook(desk, times=2)
    assert done.returncode == 0, done.stderr
    first, second, where = done.stdout.splitlines()
    assert f"(installed from {ADDRESS.folder})" in first
    assert "(checkout at .)" in second
    assert first.endswith("stored results in results") and second.endswith("results in results")
    assert where.endswith(f"at {desk / ADDRESS.folder}")
    asked = (tools / "asked.txt").read_text().split()
    assert asked[2] == str(desk / ADDRESS.folder) and len(asked) == 6

    (tools / "archive").unlink()
    another = open_notebook(desk)  # the kernel is started anew
    line, where = another.stdout.splitlines()
    assert "(installed)" in line and line.endswith("stored results in results")
    assert where.endswith(f"at {desk / ADDRESS.folder}")


def test_where_nothing_answers_the_cell_fails_and_says_what_is_missing(desk):
    done = open_notebook(desk)
    assert done.returncode == 1
    assert "No module named 'crt_lib'" in done.stderr
    assert "curl: (6)" in done.stdout + done.stderr
