"""The house stays one that can be read: its core, its functions and its doors are small."""

import ast
from pathlib import Path

import pytest

import crt_lib

HOUSE = Path(crt_lib.__file__).parent
# the public face and the commands name what all rooms do, inside functions
FACES = {HOUSE / "__init__.py", *(HOUSE / "commands").glob("*.py")}
FILES = sorted(HOUSE.rglob("*.py"))


def imported(tree: ast.Module) -> set[str]:
    """The modules of ours that a module imports anywhere, those for type checkers apart."""
    apart = [
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    ]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in apart:
            continue
        package = str(node.module).replace(".", "/")
        if package.startswith("crt_lib"):
            for name in node.names:
                module = HOUSE.parent / package / f"{name.name}.py"
                found.add(f"{package}/{name.name}" if module.exists() else package)
    return found


def test_the_core_is_read_in_an_evening():
    core = sorted(HOUSE.glob("*.py"))
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in core}
    assert len(lines) <= 14 and sum(lines.values()) <= 2600
    assert lines["model.py"] + lines["layers.py"] <= 450


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_functions_fit_a_screen_and_modules_have_few_neighbours(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
            assert node.end_lineno - first + 1 <= 50, node.name
    assert path in FACES or len(imported(tree)) <= 8, imported(tree)
