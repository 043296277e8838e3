"""A whole run: corpus, tokenizer, training, evaluation, and what it leaves in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from crt_lib.checkpoint import RunFolder, load_model, read_metrics, read_timing
from crt_lib.files import read_rows
from crt_lib.runs.machine import matmul_peak, peak_memory, utilisation
from crt_lib.runs.manifest import read_manifest, run_environment, update_manifest
from crt_lib.runs.profiles import Profile
from crt_lib.runs.scores import check_scorable, write_scores
from crt_lib.runs.trained import keep_tokenizer, load_data
from crt_lib.train import train


@dataclass(frozen=True)
class Run:
    """A finished run as its folder tells it."""

    out: Path
    manifest: dict[str, Any]  # the manifest's `train` part
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    results: list[dict[str, Any]]  # rows of results.csv, numbers parsed


def run_profile(
    profile: Profile,
    out: str | Path,
    *,
    resume: bool = True,
    progress: bool = True,
    log_with: Sequence[str] = (),
    **how: Any,
) -> Run | Literal["not the main process"] | None:
    """Train `profile` in `out` and evaluate it; a finished part is not done again.

    Writes what `train` and `write_scores` write, and the manifest's `train` part. Returns None when
    a signal stopped the training, and a word in processes that only helped. Raises InputError as
    they do. `how`: `losses` and `begin` of `train`.
    """
    out = Path(out)
    data = load_data(profile)
    check_scorable(data)
    profile = profile.replace(model=profile.model.replace(vocab_size=data.tokenizer.vocab_size))
    made = profile.record() | {"data": data.record(), "environment": run_environment()}
    earlier = load_run(out) if resume else None
    if earlier and profile.matches(earlier.manifest) and earlier.manifest["data"] == made["data"]:
        return earlier
    note = partial(update_manifest, out, profile.name)
    begin = partial(note, train=made | {"status": "running"})
    how |= {"resume": resume, "progress": progress, "log_with": log_with}
    result = train(profile.model, profile.train, data, out, on_start=begin, **how)
    if not result.is_main:
        return "not the main process"
    seconds = [row["seconds"] for row in read_timing(out)]
    made |= {"processes": result.processes, "precision": result.precision._asdict()}
    made |= {"seconds": seconds[-1], "peak_memory_bytes": peak_memory()}
    if not result.finished:
        note(train=made | {"status": "stopped"})
        return None
    path, device = RunFolder(out).checkpoint("best"), next(result.model.parameters()).device
    keep_tokenizer(data.tokenizer, path)
    made["matmul_peak"] = peak = matmul_peak(device, result.precision.name, 1024)
    made["mfu"] = utilisation(profile.model, profile.train, seconds, peak)
    write_scores(load_model(path, device), profile, data, out, progress)
    note(train=made | {"status": "done"})
    return load_run(out)


def load_run(out: str | Path) -> Run | None:
    """The finished run in `out`, or None when there is none."""
    out = Path(out)
    part = read_manifest(out).get("train")
    if part is None or part["status"] != "done" or not (out / "results.csv").is_file():
        return None
    return Run(out, part, read_metrics(out), read_timing(out), read_rows(out / "results.csv"))
