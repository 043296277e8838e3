"""`crt select`: a few configurations, each trained for the same wall time, compared on valid."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crt_lib.accounting import parameters_by_part
from crt_lib.config import Profile
from crt_lib.files import InputError
from crt_lib.runfolder import read_timing
from crt_lib.runs import load_data, read_rows, write_rows
from crt_lib.train import TrainResult, train

WARM_UP, TIMED = 2, 4  # updates that measure a candidate's speed


def select(
    candidates: dict[str, Profile],
    minutes: float,
    out: str | Path,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train each candidate for `minutes` and write its row to `out`, a CSV file.

    The number of updates is fixed before the run, from the candidate's measured speed, so that its
    learning rate ends where it should; the row has the seconds it really took, and the loss on the
    first `eval_tokens` of valid at the best exit: candidates must share a tokenizer. Those already
    in the file are skipped.
    """
    if not minutes > 0:
        raise InputError(f"minutes is {minutes}; it must be positive")
    out = Path(out)
    rows = read_rows(out) if out.exists() else []
    for name, profile in candidates.items():
        if any(row["candidate"] == name for row in rows):
            echo(f"{name}: already in {out}")
            continue
        rows.append({"candidate": name} | _measure(profile, minutes, out.parent / ".select"))
        write_rows(out, rows)
        echo(f"{name}: loss {rows[-1]['valid_loss']:.3f} after {rows[-1]['tokens']:,} tokens")
    return rows


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the lowest loss on valid."""
    return min(rows, key=lambda row: row["valid_loss"])


def _measure(profile: Profile, minutes: float, folder: Path) -> dict[str, Any]:
    data = load_data(profile)
    model_config = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    try:
        trial = profile.train.replace(updates=WARM_UP + TIMED, eval_every=0, eval_tokens=256)
        _finished(train(model_config, trial, data, folder, resume=False, progress=False))
        seconds = [row["seconds"] for row in read_timing(folder)]
        pace = (seconds[-1] - seconds[WARM_UP - 1]) / TIMED
        updates = max(1, round(60 * minutes / pace))
        config = profile.train.replace(updates=updates, eval_every=0)
        result = _finished(train(model_config, config, data, folder, resume=False, progress=False))
        last = result.metrics[-1]
        losses = {loop: last[f"valid_loss_{loop}"] for loop in model_config.head_loops}
        exit_loop = min(losses, key=losses.get)
        return {
            "parameters": sum(parameters_by_part(model_config).values()),
            "updates": updates,
            "tokens": last["tokens"],
            "seconds": read_timing(folder)[-1]["seconds"],
            "best_exit": exit_loop,
            "valid_loss": losses[exit_loop],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finished(result: TrainResult) -> TrainResult:
    if not result.finished:
        raise KeyboardInterrupt
    return result
