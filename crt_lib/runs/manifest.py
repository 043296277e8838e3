"""What a run ran on and how far it is: a manifest.json in its folder.

The pipeline writes which notebooks are done, a training its part `train`; each keeps the other's.
"""

import contextlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, locked, sha256, write_json

PACKAGES = (
    *("crt-lm", "torch", "numpy", "tokenizers", "safetensors", "accelerate", "transformers"),
    *("datasets", "pandas", "matplotlib", "papermill", "nbconvert", "ipykernel"),
)

MOST = 2**24  # bytes of a manifest


def checkout_root() -> Path:
    """The folder that holds `crt_lib` and `notebooks`, else the current one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "notebooks").is_dir() else Path.cwd()


def run_environment() -> dict[str, Any]:
    """What a result depends on besides its inputs, as JSON-able values.

    `git`: None outside the project's checkout; `device`: the GPU's name, else the processor's;
    `isa`: the vector instructions that torch uses; `cpu_count`: cores this process may use;
    `memory_limit`: the share of the GPU's memory that it may have, None without a GPU.
    """
    import torch

    gpu = torch.cuda.is_available()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = of_proc("/proc/cpuinfo", "model name") or platform.machine()
    return {
        "versions": versions,
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "device": torch.cuda.get_device_name() if gpu else processor,
        "isa": "CUDA" if gpu else torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "cpu_count": cores,
        "torch_threads": torch.get_num_threads(),
        "memory_limit": torch.cuda.get_per_process_memory_fraction() if gpu else None,
        "time": now(),
    }


def library_sha256() -> str:
    """One hash over the sources of `crt_lib` and its profiles: their names and contents."""
    root = Path(__file__).resolve().parents[1]
    paths = sorted([*root.rglob("*.py"), *root.rglob("*.toml")])
    parts = [f"{p.relative_to(root).as_posix()} {sha256(p.read_bytes())}" for p in paths]
    return sha256("\n".join(parts).encode())


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_manifest(out: str | Path, profile: str | None = None) -> dict[str, Any]:
    """The values of the manifest in `out`, {} without one.

    Raises InputError if the file is no manifest or belongs to another profile than the one given.
    """
    path = Path(out) / "manifest.json"
    advice = "Move it away, or choose another results folder."
    try:
        if path.stat().st_size > MOST:
            raise ValueError(f"it has more than {MOST:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["profile"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a manifest ({error!r}). {advice}") from error
    if profile not in (None, found):
        raise InputError(f"{path} belongs to the profile {found!r}, not {profile!r}. {advice}")
    return values


def update_manifest(
    out: str | Path,
    profile: str,
    notebooks: dict[str, dict[str, Any]] | None = None,
    **parts: Any,
) -> None:
    """Put `parts`, and entries of `notebooks`, into the manifest in `out`, keeping all others.

    Raises InputError as `read_manifest`, and if the folder cannot be written.
    """
    path = Path(out) / "manifest.json"
    with locked(path):
        values = read_manifest(out, profile)
        if notebooks is not None:
            parts["notebooks"] = dict(sorted((values.get("notebooks", {}) | notebooks).items()))
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
            left.unlink()
        write_json(path, values | {"profile": profile} | parts)


def of_proc(file: str, name: str) -> str:
    """What a file of /proc says of `name`; "" where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


def _git_state(root: Path) -> dict[str, Any] | None:
    """Of a checkout at `root` itself; a run rewrites results/, which does not make it modified."""
    if not (root / ".git").exists():
        return None
    words = ["status", "--porcelain=v2", "--branch", "--", ".", ":(exclude)results"]
    try:
        how: dict[str, Any] = {"cwd": root, "text": True, "timeout": 30}
        said = subprocess.check_output(["git", *words], stderr=subprocess.DEVNULL, **how)
    except (OSError, subprocess.SubprocessError):
        return None
    commit, *lines = said.splitlines()  # "# branch.oid <commit>", other "# ...", what is changed
    changed = any(not line.startswith("#") for line in lines)
    return {"commit": commit.split()[-1], "dirty": changed}
