"""Checkpoints: one safetensors file each, replaced atomically, never unpickled.

A file holds the weights (`model.<name>`), for a resumable one the optimizers' moments too
(`optimizer.<parameter>.<moment>`), and as metadata `checkpoint`, a JSON text of `model`, the
configuration, and `state`, the counters. Random state is a function of (seed, update).
Where `<file>.sha256` lies beside it, as `sha256sum` writes it, the file must be that one.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from crt_lib.config import AnyModelConfig, LanguageModel, TrainConfig, config_from_dict, make_model
from crt_lib.files import InputError, atomic_path, check_sum, write_json, write_text


def save_checkpoint(
    path: str | Path,
    model: LanguageModel,
    state: dict[str, Any],
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Write `model`, the JSON-able `state` and the optimizers' moments to `path`, atomically.

    Raises InputError when the folder cannot be written or the disk is full; an older file stays.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for optimizer in optimizers:
        names = _names(model, optimizer)
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer.{names[parameter]}.{key}"] = value
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"checkpoint": json.dumps({"model": model.config.to_dict(), "state": state})}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model of a checkpoint, in evaluation mode.

    Raises InputError for a file that is missing, truncated, not ours, or holds NaN or infinity.
    """
    tensors, config, _ = _read(Path(path))
    model = make_model(config)
    _load_weights(model, tensors, path)
    return model.to(device).eval()


def read_state(path: str | Path) -> dict[str, Any]:
    """The `state` that was saved with a checkpoint; raises InputError as `load_model` does."""
    return _open(Path(path))[2]


def restore(
    path: str | Path, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Load weights and moments in place and return the saved state.

    Raises InputError as `load_model` does, and when it was saved without an optimizer.
    """
    tensors, _, state = _read(Path(path))
    _load_weights(model, tensors, path)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part == "optimizer":
            name, _, moment = rest.rpartition(".")
            moments.setdefault(name, {})[moment] = value
    if not moments:
        raise InputError(f"{path} has no optimizer state; it can be evaluated, not resumed")
    for optimizer in optimizers:  # a head that no update has used yet has no moments
        names = enumerate(_names(model, optimizer).values())
        own = {index: moments[name] for index, name in names if name in moments}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": own, "param_groups": groups})
    return state


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The names of the optimizer's parameters, in its order."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {p: names[p] for group in optimizer.param_groups for p in group["params"]}


def _open(path: Path) -> tuple[Any, AnyModelConfig, dict[str, Any]]:
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint {path}; train one with `crt train --out <another folder>` "
            "(stored results are kept without their checkpoints)"
        )
    try:
        file = safe_open(path, framework="pt")
        kept = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        kept = kept.get("checkpoint", kept)  # older files have two texts, in an order of chance
        return file, config_from_dict(kept["model"]), kept["state"]
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} is truncated or not a checkpoint of `crt train` ({error}); use another one, "
            "or start over with --fresh"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], AnyModelConfig, dict[str, Any]]:
    file, config, state = _open(path)
    check_sum(path)
    return {name: file.get_tensor(name) for name in file.keys()}, config, state  # noqa: SIM118


def _load_weights(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    weights = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(
                f"{path}: {name} holds NaN or infinite weights; use an earlier checkpoint, or "
                "start over with --fresh"
            )
    found, expected = ({n: v.shape for n, v in s.items()} for s in (weights, model.state_dict()))
    wrong = sorted({name for name, _ in found.items() ^ expected.items()})
    if wrong:
        raise InputError(f"{path} does not fit its model: {', '.join(wrong[:3])}")
    model.load_state_dict(weights)


class RunFolder:
    """Appends a run's rows to `path` and names its checkpoints."""

    def __init__(self, path: str | Path):
        if not isinstance(path, str | Path) or "\0" in str(path):
            raise InputError(f"{path!r:.60} is no path; give that of the run's folder")
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"  # wall-clock times, which differ from run to run

    def checkpoint(self, name: str) -> Path:
        """The file of the checkpoint `name`: last, best or update-<number>."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def earlier(self) -> dict[str, Any] | None:
        """The record of the run that `last` is of, or None; InputError if only results are left."""
        last = self.checkpoint("last")
        if last.exists():
            run = read_state(last)["run"]
            return run | {  # a setting that came later was at its default
                "model": config_from_dict(run["model"]).to_dict(),
                "train": TrainConfig.from_dict(run["train"]).to_dict(),
            }
        if (self.path / "results.csv").exists():
            raise InputError(
                f"{self.path} holds a finished run of other settings, its checkpoints gone; "
                "use another folder, or start over there with resume=False (--fresh)"
            )
        return None

    def prepare(self, record: dict[str, Any], updates_done: int, metrics_bytes: int) -> float:
        """Make the folder hold exactly what a run has written after `updates_done` updates.

        Rows beyond that, and what a killed write left, are removed; for 0 updates the checkpoints
        of an earlier run too. Returns the seconds those updates took.
        """
        self.metrics.touch()
        _rows(self.metrics, "update", metrics_bytes)  # or an error, while nothing is changed
        rows = _rows(self.timing, "seconds")[:updates_done]
        if self.metrics.stat().st_size < metrics_bytes or (updates_done and not rows):
            short = f"{self.metrics} or {self.timing.name} is shorter than its checkpoint says"
            raise InputError(f"{short}; restore it, or start over with --fresh")
        write_json(self.path / "config.json", record)
        checkpoints = self.checkpoint("last").parent
        checkpoints.mkdir(exist_ok=True)
        own, scores = ("config", "timing", "results", "exits"), ("results.csv", "exits.csv")
        stale = [*checkpoints.glob(".*.tmp"), *checkpoints.glob(".tmp*")]  # ours; of safetensors
        stale += [file for file in self.path.glob(".*.tmp") if file.name.split(".")[1] in own]
        if updates_done == 0:
            stale += [*map(self.path.joinpath, scores), *checkpoints.glob("*.safetensors*")]
        for file in stale:
            file.unlink(missing_ok=True)
        os.truncate(self.metrics, metrics_bytes)
        write_text(self.timing, "".join(json.dumps(row) + "\n" for row in rows))
        return rows[-1]["seconds"] if rows else 0.0

    def sync(self) -> None:
        """Return when the metrics are on the disk: a checkpoint must not outlive its rows."""
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order; raises InputError when there is none."""
    if not (path := RunFolder(out).metrics).is_file():
        raise InputError(f"{path} does not exist; train a model there first")
    return _rows(path, "update")


def read_timing(out: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's timing.jsonl: update, seconds so far, text tokens a second."""
    return _rows(RunFolder(out).timing, "seconds")


def _rows(path: Path, key: str, size: int | None = None) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes()[:size].decode() if path.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        if not all(isinstance(row, dict) and key in row for row in rows):  # a cut last is none
            raise ValueError(f"a row has no {key!r}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or use --fresh") from error
    return rows


def append_row(path: Path, row: dict[str, Any]) -> int:
    """Append a row to a file of JSON lines; returns the file's length in bytes."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        return file.tell()
