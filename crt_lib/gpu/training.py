"""`crt gpu`, part training: `crt2` and a GPT-2 of equal multiply-adds, the same minutes each.

Both read WikiText-2's words in the same order, in the same batches, with the same dropout and
weight decay; the learning rate of each is half of what was best for it at half the width
(results/small), not tuned here. Its pace is measured first, so that the rate ends where the minutes
do.
"""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.checkpoint import RunFolder, load_model, read_timing
from crt_lib.config import GPT2Config, ModelConfig, TrainConfig
from crt_lib.device import DTYPES
from crt_lib.evaluate import evaluate
from crt_lib.files import InputError, read_rows, stop_signals, write_json
from crt_lib.gpu.parts import Job, Row, Table, Unfinished
from crt_lib.runs.machine import matmul_peak, utilisation
from crt_lib.runs.manifest import checkout_root, peak_memory, run_environment
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.runs.trained import load_data
from crt_lib.text.tokenizer import TokenizedCorpus
from crt_lib.train import TrainResult, train

WARM_UP, TIMED = 5, 20  # updates that measure an arm's pace
VALIDATIONS = 6  # of an arm, with a checkpoint each
TO_SCORE = 16.0  # seconds that scoring an arm may take
TO_BEGIN = 5.0  # seconds that must be left to go on with an arm
TOY_UPDATES = 60  # that an arm makes in a rehearsal
DROPOUT, WEIGHT_DECAY = 0.3, 0.1
STRIDE = 64  # tokens scored a window where windows overlap; the rest is context
PUBLISHED = "AWD-LSTM"  # of results/published.csv


def arms(toy: bool) -> dict[str, Profile]:
    """`crt2` of 24M parameters, and the GPT-2 of its width that has the nearest multiply-adds."""
    crt2, gpt2 = (load_profile("smoke" if toy else "small", name) for name in ("crt2", "gpt2"))
    if not toy:
        settings = crt2.train.replace(
            batch_size=32, weight_decay=WEIGHT_DECAY, precision="bf16", eval_tokens=65_536
        )
        rates = {p.recipe: p.train.max_lr / 2 for p in (crt2, gpt2)}
        crt2 = crt2.replace(
            tokenizer="word",
            model=crt2.model.replace(
                d_model=512,
                max_seq_len=256,
                dropout=DROPOUT,
                embed_dim=512,
                embed_dropout=DROPOUT,
            ),
            train=settings.replace(max_lr=rates["crt2"]),
        )
        gpt2 = crt2.replace(
            recipe="gpt2",
            model=GPT2Config(
                d_model=512, n_heads=crt2.model.n_heads, max_seq_len=256, dropout=DROPOUT
            ),
            train=settings.replace(max_lr=rates["gpt2"]),
        )
    assert isinstance(gpt2.model, GPT2Config)
    return {"crt2": crt2, "gpt2": gpt2.replace(model=equal_cost(gpt2.model, crt2))}


def equal_cost(gpt2: GPT2Config, crt2: Profile) -> GPT2Config:
    """`gpt2` with the layers that bring it nearest to `crt2` in multiply-adds a token."""
    seq_len, wanted = crt2.train.seq_len, _cost(crt2.model, crt2.train.seq_len)
    gpt2 = gpt2.replace(vocab_size=crt2.model.vocab_size)
    tried = (gpt2.replace(n_layers=layers) for layers in range(1, 65))
    return min(tried, key=lambda config: abs(_cost(config, seq_len) - wanted))


def _cost(config: ModelConfig | GPT2Config, seq_len: int) -> int:
    """Multiply-adds a token at full depth, with the last head alone."""
    return sum(multiply_adds(config, seq_len, config.head_loops[-1:]).values())


def run_training(job: Job) -> None:
    """Train and score each arm: rows of training.csv, and of curves.csv a validation each.

    Raises Unfinished when an arm was cut. What it has learned by then is scored, and the next call
    goes on from its checkpoint with the plan that it began with.
    """
    folder, cut = job.out / "training", []
    chosen = arms(job.toy)
    data = load_data(chosen["crt2"])
    table, curves = Table(job.out / "training.csv", "arm"), Table(job.out / "curves.csv", "arm")
    plan = _plan(job, chosen, data, folder)
    waiting = [n for n in chosen if not any(r["finished"] == "yes" for r in table.find(n))]
    for i, name in enumerate(waiting):
        seconds = job.left() - (len(waiting) - i) * plan["to_score"]
        if seconds < TO_BEGIN:
            cut.append(name)
            continue
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        settings = chosen[name].train.replace(**plan["arms"][name])
        model = _sized(chosen[name], data)
        with _stop_after(seconds):
            result = train(model, settings, data, folder / name, progress=False)
        cut += [name] * (not result.finished)
        common, validated = _about(name, model, settings, data, result)
        if validated:
            table.put(_scored(common, data, result.out, settings.seq_len))
            curves.put(validated)
            _tell(table.find(name))
    if cut:
        raise Unfinished(f"no time was left to end {', '.join(cut)}")


def _sized(profile: Profile, data: TokenizedCorpus) -> ModelConfig | GPT2Config:
    return profile.model.replace(vocab_size=data.tokenizer.vocab_size)


def _plan(
    job: Job, chosen: dict[str, Profile], data: TokenizedCorpus, folder: Path
) -> dict[str, Any]:
    """The updates of each arm, and the seconds to score one, as first planned in `folder`."""
    path, device = folder / "plan.json", run_environment()["device"]
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["device"] != device:
            raise InputError(
                f"{folder} was begun on {plan['device']}, this is {device}; equal minutes need one "
                "kind of machine: use another folder"
            )
        return plan
    measured = {name: _pace(profile, data) for name, profile in chosen.items()}
    to_score = 1.0 if job.toy else TO_SCORE
    halts = VALIDATIONS * max(halt for _, halt in measured.values())
    seconds = job.left() / len(chosen) - to_score - halts
    slowest = max(pace for pace, _ in measured.values())
    seconds = min(seconds, TOY_UPDATES * slowest) if job.toy else seconds
    if seconds < TIMED * slowest:
        raise Unfinished("no time was left to train")
    plan = {"device": device, "seconds": seconds, "to_score": to_score, "arms": {}}
    for name, (pace, halt) in measured.items():
        updates = round(seconds / pace)
        often = -(-updates // VALIDATIONS)
        arm = {"updates": updates, "eval_every": often, "checkpoint_every": often}
        plan["arms"][name] = arm
        print(f"  {name}: {updates} updates of {pace:.4f} s, halts of {halt:.1f} s", flush=True)
    write_json(path, plan)
    return plan


def _pace(profile: Profile, data: TokenizedCorpus) -> tuple[float, float]:
    """Seconds an update, the median once the first are made, and of a validation with what it
    writes.
    """
    settings = profile.train.replace(
        updates=WARM_UP + TIMED, eval_every=0, checkpoint_every=WARM_UP + TIMED
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if not train(_sized(profile, data), settings, data, folder, progress=False).finished:
            raise Unfinished("stopped while a pace was measured")
        ends = [row["seconds"] for row in read_timing(folder)]
    halt = time.perf_counter() - started - ends[-1]
    return float(np.median(np.diff(ends)[WARM_UP - 1 :])), halt


@contextmanager
def _stop_after(seconds: float) -> Iterator[None]:
    """Tell the training of this process to save and to stop when its time is up."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    with stop_signals():  # should the training be over, nothing else is stopped
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _about(
    name: str,
    model: ModelConfig | GPT2Config,
    settings: TrainConfig,
    data: TokenizedCorpus,
    result: TrainResult,
) -> tuple[Row, list[Row]]:
    """What each row of an arm begins with, and its validations."""
    timing, last = read_timing(result.out), f"valid_loss_{model.n_loops}"
    ends = {row["update"]: row["seconds"] for row in timing}
    seconds, tokens = list(ends.values()), max(row["tokens"] for row in result.metrics)
    peak = matmul_peak(next(result.model.parameters()).device, DTYPES[result.precision.name], 1024)
    common: Row = {
        "arm": name,
        "finished": "yes" if result.finished else "no",
        "corpus": data.corpus.name,
        "parameters": sum(parameters_by_part(model).values()),
        "multiply_adds": _cost(model, settings.seq_len),
        "layers": model.n_loops,
        "d_model": model.d_model,
        "dropout": model.dropout,
        "weight_decay": settings.weight_decay,
        "optimizer": settings.optimizer,
        "max_lr": settings.max_lr,
        "precision": result.precision.name,
        "updates": len(timing),
        "planned": settings.updates,
        "tokens_seen": tokens,
        "passes": tokens / len(data.train.ids),
        "seconds": seconds[-1],
        "tokens_per_second": tokens / seconds[-1],
        "mfu": utilisation(model, settings, seconds, peak),
        "memory": peak_memory(),
        "device": run_environment()["device"],
    }
    validated = [
        {"arm": name, "update": row["update"], "tokens_seen": row["tokens"]}
        | {"seconds": ends[row["update"]], "valid_loss": row[last]}
        for row in result.metrics
        if last in row
    ]
    return common, validated


def _scored(common: Row, data: TokenizedCorpus, out: Path, seq_len: int) -> list[Row]:
    """A row for each split, stride and exit of the best checkpoint in `out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = load_model(RunFolder(out).checkpoint("best"), device)
    rows: list[Row] = []
    for split in ("valid", "test"):
        for stride in (seq_len, min(STRIDE, seq_len // 2)):
            found = evaluate(
                best,
                data.split(split),
                data.tokenizer.eot_id,
                seq_len=seq_len,
                stride=stride,
                batch_size=64,
            )
            rows += [common | row for row in found.rows(split=split, stride=stride)]
    return rows


def _tell(rows: list[Row]) -> None:
    last = rows[-1]  # test, overlapping windows, the last exit
    line = f"  {last['arm']}: {last['passes']:.1f} passes in {last['seconds']:.0f} s of updates, "
    line += f"test {last['word_ppl']:.1f} a word, {last['parameters'] / 1e6:.1f}M parameters"
    published = checkout_root() / "results" / "published.csv"
    if last["corpus"] == "wikitext-2" and published.is_file():
        for row in read_rows(published):
            if (row["model"], row["corpus"]) == (PUBLISHED, "wikitext-2"):
                line += f"; published: {PUBLISHED}, {row['parameters']}, {row['ppl']}"
    print(line, flush=True)
