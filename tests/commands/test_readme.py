"""The pages' commands: those that can run here run, the rest at least have options that exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crt_lib import cli
from crt_lib.cli import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "MODEL_CARD.md", "docs/usage.md", "results/README.md", "CONTRIBUTING.md")
FENCE = re.compile(
    r"(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<kind>bash|python)\n(?P<text>.*?)```", re.S
)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    runs: bool

    @property
    def commands(self) -> list[str]:
        """Its lines, continued ones joined, comments left out."""
        joined = self.text.replace("\\\n", " ")
        lines = (line.split(" #")[0].strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(m["kind"], m["text"], m["mark"] is None) for m in FENCE.finditer(text)]
    assert len(found) == len(re.findall(r"^```(?:bash|python)$", text, re.M))
    return found


def arguments(command: str) -> list[str] | None:
    """The words after `crt`, however it is started; None for another program's command."""
    words = shlex.split(command)
    if words[0] == "crt":
        return words[1:]
    if "crt_lib.cli" in words:
        return words[words.index("crt_lib.cli") + 1 :]
    return None


def inline(page: str) -> list[str]:
    """Commands in the page's tables and sentences."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found = re.findall(r"`(crt [a-z-]+(?: [^`]+)?)`", text)
    return [command for each in found for command in each.split(" && ")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a clone has, to run commands in."""
    folder = tmp_path_factory.mktemp("clone")
    left_out = shutil.ignore_patterns("quick", "smoke", "traces", "last.safetensors", "update-*")
    shutil.copytree(ROOT / "results", folder / "results", ignore=left_out)
    for name in (*PAGES, "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(words: list[str], folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CRT_DATA_ROOT"}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


@cache  # what two pages say is run once
def crt(command: str, folder: Path) -> None:
    """Through `main`, in this process, as if called in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CRT_DATA_ROOT", raising=False)
        patch.setattr("sys.argv", shlex.split(command))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code, command


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_as_they_stand(page, checkout):
    for block in blocks(page):
        if not block.runs:
            continue
        if block.kind == "python":
            run([sys.executable, "-c", block.text], checkout)
            continue
        for command in block.commands:
            words = shlex.split(command)
            if words[0] == "make":
                run(["make", "--dry-run", *words[1:]], ROOT)
            else:
                assert words[0] == "crt", command
                crt(command, checkout)


def every_command() -> list[str]:
    fenced = [
        command
        for page in PAGES
        for block in blocks(page)
        if block.kind == "bash"
        for command in block.commands
    ]
    return [c for c in [*fenced, *(c for page in PAGES for c in inline(page))] if arguments(c)]


@pytest.mark.parametrize("command", every_command())
def test_options_of_every_command_exist(command):
    result = CliRunner().invoke(app, [*arguments(command), "--help"])
    assert result.exit_code == 0, result.output


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"
        for name in re.findall(r"\b(\w+\.py)\b", text):
            if name != "mine.py":
                found = [*(ROOT / "crt_lib").rglob(name), *(ROOT / "tests").rglob(name)]
                assert found, f"{page} names {name}"


def test_the_house_plan_has_a_line_for_every_file():
    plan = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `([\w/]+\.py)` \|", plan, re.M)
    folder = ROOT / "crt_lib"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    doors = {f"{path.parent.name}/__init__.py" for path in folder.glob("*/__init__.py")}
    assert sorted(said) == sorted(files - doors - {"gpu/__main__.py"})
    rooms = re.findall(r"^\| \*\*`(\w+)/`\*\* \|", plan, re.M)
    assert {f"{room}/__init__.py" for room in rooms} == doors


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
