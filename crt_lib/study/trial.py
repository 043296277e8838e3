"""One training of a search: what tells it from others, and what it took and came to."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crt_lib.audit.compare import document_of_tokens, score_documents
from crt_lib.audit.protocols import evaluate_deployable
from crt_lib.checkpoint import read_timing
from crt_lib.evaluate import evaluate
from crt_lib.runs.graphs import GraphedLosses, graphs_fit
from crt_lib.runs.profiles import Profile
from crt_lib.runs.trained import load_data
from crt_lib.train import TrainingError, TrainResult, train

if TYPE_CHECKING:
    from crt_lib.config import LanguageModel
    from crt_lib.text.tokenizer import TokenizedCorpus

WARM_UP, TIMED = 3, 20  # updates that measure an arm's speed
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training: an arm's name, and the profile with its learning rate, seed and updates."""

    arm: str
    profile: Profile
    minutes: float | None = None  # of processor time, instead of the updates

    @property
    def key(self) -> Row:
        """What tells its rows from those of other trials.

        `settings` is the profile's fingerprint: rows of an arm that was changed differ.
        """
        config = self.profile.train
        return {
            "arm": self.arm,
            "budget": f"{self.minutes:g} min" if self.minutes else f"{config.updates} updates",
            "max_lr": config.max_lr,
            "seed": config.seed,
            "settings": self.profile.fingerprint(),
        }

    @property
    def seed(self) -> int:
        """That of its training."""
        return self.profile.train.seed

    def folder(self, keep: Path) -> Path:
        """Its own folder below `keep`."""
        return keep / f"{self.key['settings']}-{self.seed}"

    def row(self, rows: Iterable[Row]) -> Row | None:
        """The first of `rows` that is of it."""
        key = self.key
        return next((row for row in rows if key.items() <= row.items()), None)


def run_trial(
    trial: Trial, threads: int, documents: bool, keep: Path | None = None
) -> tuple[Row, list[Row]]:
    """One trial, in this process; its row and, if asked for, those of test's documents."""
    torch.set_num_threads(threads)
    data, config = load_data(trial.profile), trial.profile.train
    eot = data.tokenizer.eot_id
    if documents:
        document_of_tokens(data, "test")  # or an error, before the training
    row = trial.key | {"parameters": 0, "updates": config.updates, "tokens": 0, "threads": threads}
    row |= {"seconds": 0.0, "cpu_seconds": 0.0, "valid_loss": math.inf, "exit_losses": ""}
    row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    by_document: list[Row] = []
    own: Any = contextlib.nullcontext(trial.folder(keep)) if keep else tempfile.TemporaryDirectory()
    with own as folder, contextlib.suppress(TrainingError):
        model, cost = _trained(trial, data, folder, resume=bool(keep))
        row |= cost
        if config.batching == "padded":  # scored on lines, as it was trained
            how: dict[str, Any] = {"protocol": "released", "seq_len": config.seq_len}
            losses = evaluate(model, data.valid, eot, **how).loss
            row |= {"valid_loss": losses[max(losses)], "exit_losses": _by_exit(losses)}
        elif not getattr(model.config, "causal", True):
            alone = evaluate_deployable(model, data.valid.ids, eot, seq_len=64)
            row["valid_loss"] = alone.loss[max(alone.loss)]
        if documents:
            scored = score_documents(model, data, "test", config.seq_len)
            nll = scored.nll[max(scored.nll)]
            columns = scored.bytes.tolist(), scored.tokens.tolist(), nll.tolist()
            by_document = [
                trial.key | {"document": i, "bytes": size, "tokens": tokens, "nll": round(nats, 3)}
                for i, (size, tokens, nats) in enumerate(zip(*columns, strict=True))
            ]
            bits = {k: of.sum() / scored.bytes.sum() / math.log(2) for k, of in scored.nll.items()}
            if keep:
                row["test_bits"] = _by_exit(bits)
    return row, by_document


def _trained(
    trial: Trial, data: "TokenizedCorpus", folder: str | Path, resume: bool
) -> tuple["LanguageModel", Row]:
    """The trained model, and what its training took and came to on valid."""
    model = trial.profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    config = trial.profile.train

    def run(**changes: Any) -> tuple[TrainResult, float]:
        begun, settings = time.process_time(), config.replace(**changes)
        losses = GraphedLosses if graphs_fit(settings) else None
        how: dict[str, Any] = {"resume": resume, "progress": False, "losses": losses}
        result = train(model, settings, data, folder, **how)
        if not result.finished:
            raise KeyboardInterrupt
        return result, time.process_time() - begun

    updates = config.updates
    if trial.minutes is not None:
        run(updates=1, eval_tokens=256)  # what only the first run of a process does
        _, first = run(updates=WARM_UP, eval_tokens=256)
        _, both = run(updates=WARM_UP + TIMED, eval_tokens=256)
        pace = max(both - first, both / 2) / TIMED
        updates = max(1, round(60 * trial.minutes / pace))
    result, seconds = run(updates=updates)
    losses = {loop: result.metrics[-1][f"valid_loss_{loop}"] for loop in model.head_loops}
    return result.model, {
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "updates": updates,
        "tokens": result.metrics[-1]["tokens"],
        "seconds": round(read_timing(folder)[-1]["seconds"], 1),
        "cpu_seconds": round(seconds, 1),
        "valid_loss": losses[model.n_loops],
        "exit_losses": _by_exit(losses),
    }


def _by_exit(losses: Mapping[int, float]) -> str:
    return " ".join(f"{loop}:{loss:.4f}" for loop, loss in losses.items())
