"""Run every notebook as Colab would: its versions, crt_lib from a wheel, another working folder.

`make test-colab` makes the environment and calls this in it, first without crt_lib for the set-up
cell.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


PINNED = ("torch", "numpy", "ipywidgets")
PRETEND = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')"


def set_up() -> None:
    """Run the set-up cell where Colab would: beside a wheel, then fetching this repository."""
    content = Path("/content")
    if content.exists() or not os.access("/", os.W_OK):
        print("the set-up cell was not tried: /content cannot be made here")
        return
    before = {name: metadata.version(name) for name in PINNED}
    source = nbformat.read(ROOT / "notebooks" / "01_data.ipynb", as_version=4)
    (cell,) = (cell for cell in source.cells if "crt_lib.book.start" in cell.source)
    (url,) = re.findall(r"https\S+", cell.source)
    (name,) = re.findall(r'sys.path.append\("(.+?)"\)', cell.source)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    assert f'"{wheel.name}"' in cell.source, wheel.name
    content.mkdir()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _answer(url, name, Path(folder))
            shutil.copy(wheel, content)
            said = _run(content, [cell.source])
            assert "site-packages" in said[0] and said[1:] == ["/content", "False"], said
            (content / wheel.name).unlink()
            uninstall = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "crt-lm"]
            subprocess.run(uninstall, check=True)

            said = _run(content, [cell.source, cell.source])
            assert said[1:] == [f"/content/{name}", "True"], said
    finally:
        shutil.rmtree(content)
    after = {name: metadata.version(name) for name in PINNED}
    assert before == after, (before, after)
    assert metadata.version("crt-lm"), "crt_lib was not installed"
    print(
        "the set-up cell: installed from a wheel, and, run twice, from the tag; torch, numpy and "
        "ipywidgets as they were"
    )


def _answer(url: str, name: str, folder: Path) -> None:
    """Put a curl on the path that gives what is committed here at `url`, and nothing elsewhere."""
    archive = ["git", "archive", f"--prefix={name}/", "--format=tar.gz"]
    subprocess.run([*archive, f"--output={folder}/archive", "HEAD"], cwd=ROOT, check=True)
    curl = folder / "curl"
    curl.write_text(f'#!/bin/sh\ntest "$2" = "{url}" && cat "{folder}/archive"\n')
    curl.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def _run(folder: Path, sources: list[str]) -> list[str]:
    """Run cells in `folder`; where crt_lib then is, the working folder, are results in it?"""
    check = (
        "import crt_lib, os\nprint(crt_lib.__file__, os.getcwd(), os.path.isdir('results/small'))"
    )
    cells = [nbformat.v4.new_code_cell(text) for text in (PRETEND, *sources, check)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return notebook.cells[-1].outputs[0].text.split()


def main() -> None:
    """Every notebook, or those named; exits with an error at the first that fails."""
    if sys.argv[1:] == ["--set-up"]:
        return set_up()
    import crt_lib

    if Path(crt_lib.__file__).resolve().parent == ROOT / "crt_lib":
        sys.exit(f"crt_lib comes from the checkout, not from a wheel: {crt_lib.__file__}")
    for name in ("ipywidgets", "ipython", "transformers", "datasets", "numpy", "torch"):
        print(f"{name} {metadata.version(name)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    os.environ.pop("CRT_DATA_ROOT", None)
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        left_out = shutil.ignore_patterns("quick", "smoke", "last.safetensors", "update-*")
        shutil.copytree(ROOT / "results", Path(folder) / "results", ignore=left_out)
        os.environ["CRT_CACHE_ROOT"] = str(Path(folder) / "cache")
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            if chosen and path.stem not in chosen:
                continue
            notebook = nbformat.read(path, as_version=4)
            begun = time.monotonic()
            where = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=where).execute()
            print(f"{path.stem:<24} {time.monotonic() - begun:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
