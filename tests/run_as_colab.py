"""Run every notebook as Colab would: its versions, crt_lib from a wheel, another working folder.

`make test-colab` makes the environment and calls this in it, first without crt_lib for the set-up
cell.
"""

import os
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
    """Run the set-up cell where Colab would, the repository being a clone of this one."""
    content = Path("/content")
    if content.exists() or not os.access("/", os.W_OK):
        print("the set-up cell was not tried: /content cannot be made here")
        return
    before = {name: metadata.version(name) for name in PINNED}
    source = nbformat.read(ROOT / "notebooks" / "01_data.ipynb", as_version=4)
    (cell,) = (cell for cell in source.cells if "CRT_VERSION = " in cell.source)
    tag = cell.source.split('CRT_VERSION = "')[1].split('"')[0]
    check = "print(crt_lib.__file__, os.getcwd(), os.path.isdir('results/small'))"
    texts = [PRETEND, cell.source, cell.source, check]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    content.mkdir()
    try:
        with tempfile.TemporaryDirectory() as folder:
            clone = ["git", "clone", "--quiet", str(ROOT), f"{folder}/crt.git"]
            subprocess.run(clone, check=True)
            subprocess.run(["git", "-C", f"{folder}/crt.git", "tag", "--force", tag], check=True)
            os.environ |= {
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": f"url.{folder}/crt.git.insteadOf",
                "GIT_CONFIG_VALUE_0": "https://github.com/crt-lm/crt.git",
            }
            where = {"metadata": {"path": str(content)}}
            NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
        said = notebook.cells[-1].outputs[0].text.split()
        assert said[1:] == ["/content/crt", "True"], said
    finally:
        shutil.rmtree(content)
    after = {name: metadata.version(name) for name in PINNED}
    assert before == after, (before, after)
    assert metadata.version("crt-lm"), "crt_lib was not installed"
    print(
        "the set-up cell, twice: installed from the tag, torch, numpy and ipywidgets as they were"
    )


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
