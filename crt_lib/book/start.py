"""The set-up cell of every notebook, once `crt_lib` can be imported: install, say where all is."""

import contextlib
import importlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import crt_lib

KEPT = ("torch", "numpy", "ipywidgets")  # a kernel has loaded them, or its page is made for them


def start() -> None:
    """Install a `crt_lib` that is only at hand, and say in one line what is used.

    A wheel beside the notebook and what the cell fetched are installed by pip, with KEPT as they
    are; the fetched folder, NAME-VERSION, becomes the working folder, for its stored results.
    Raises CalledProcessError where pip fails.
    """
    home = Path(crt_lib.__file__).resolve().parents[1]
    found = [folder.parent for folder in Path.cwd().glob(f"*-{crt_lib.__version__}/crt_lib")]
    sys.path[:] = [path for path in sys.path if not path or os.path.isabs(path)]
    said = "installed"
    if home in found or home.suffix == ".whl":
        _install(home)
        said = f"installed from {home.name}"
    elif (home / "pyproject.toml").is_file():
        if str(home) not in sys.path:  # other working folders and processes import it, too
            sys.path.append(str(home))
            paths = filter(None, (os.environ.get("PYTHONPATH"), str(home)))
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        said = f"checkout at {os.path.relpath(home)}"
    if found:
        os.chdir(found[0])
    from crt_lib.runs.manifest import checkout_root

    versions = f"torch {_version('torch')}, Python {platform.python_version()}"
    results = checkout_root() / "results"
    stored = f"stored results in {os.path.relpath(results)}"
    stored = stored if results.is_dir() else "no stored results here"
    print(f"crt_lib {crt_lib.__version__} ({said}), {versions}; {stored}")


def _install(source: Path) -> None:
    kept = [f"{name}=={known}" for name in KEPT if (known := _version(name))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", str(source), *kept]
    subprocess.run(pip, check=True)
    # What was imported from `source` is forgotten: the notebook imports what is installed.
    for name in [name for name in sys.modules if name.partition(".")[0] == "crt_lib"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None
