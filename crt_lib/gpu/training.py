"""`crt gpu`, part training: `crt2` and a GPT-2 of equal multiply-adds, the same minutes each.

Both read WikiText-2's words in the same order, in the same batches, with the same dropout and
weight decay; the learning rate of each is half of what was best for it at half the width
(results/small), not tuned here. Its pace is measured first, so that the rate ends where the minutes
do.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from crt_lib.bench.dryrun import predict
from crt_lib.bench.table import Table
from crt_lib.bench.ways import cost_of_a_token, matched
from crt_lib.config import GPT2Config, config_from_dict
from crt_lib.files import InputError, stop_signals, write_json
from crt_lib.gpu.parts import Job, Row, Unfinished
from crt_lib.runs.manifest import run_environment
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.runs.run import Run, run_profile

VALIDATIONS = 6  # of an arm, with a checkpoint each
SPARE = 0.1  # of the time, for reading the text and what was not foreseen
TO_BEGIN = 5.0  # seconds that must be left to go on with an arm, and to train at all
TOY_UPDATES = 60  # that an arm makes in a rehearsal
DROPOUT, WEIGHT_DECAY = 0.3, 0.1
WORDS = 33_278  # of WikiText-2


def arms(toy: bool) -> dict[str, Profile]:
    """`crt2` of 24M parameters, and the GPT-2 of its width that has the nearest multiply-adds."""
    crt2, gpt2 = (load_profile("smoke" if toy else "small", name) for name in ("crt2", "gpt2"))
    if not toy:
        size = {"d_model": 512, "max_seq_len": 256, "dropout": DROPOUT, "vocab_size": WORDS}
        wide = crt2.model.replace(**size, embed_dim=512, embed_dropout=DROPOUT)
        settings = crt2.train.replace(
            batch_size=32, weight_decay=WEIGHT_DECAY, precision="bf16", eval_tokens=65_536
        )
        theirs = GPT2Config(**size, n_heads=wide.n_heads)
        rates = {arm.recipe: settings.replace(max_lr=arm.train.max_lr / 2) for arm in (crt2, gpt2)}
        crt2 = crt2.replace(tokenizer="word", model=wide, train=rates["crt2"])
        gpt2 = crt2.replace(recipe="gpt2", model=theirs, train=rates["gpt2"])
    assert isinstance(gpt2.model, GPT2Config)
    theirs = gpt2.model.replace(vocab_size=crt2.model.vocab_size)
    equal = matched(theirs, crt2.model, crt2.train.seq_len)
    return {"crt2": crt2, "gpt2": gpt2.replace(model=equal)}


def run_training(job: Job) -> None:
    """Train and score each arm, in training/: rows of training.csv, and of curves.csv.

    Raises Unfinished when an arm was cut; the next call goes on from its checkpoint with the plan
    that it began with.
    """
    folder, cut = job.out / "training", []
    table, curves = Table(job.out / "training.csv", "arm"), Table(job.out / "curves.csv", "arm")
    plan = _plan(job, folder / "plan.json")
    waiting = [name for name in plan["arms"] if not table.find(name)]
    for i, name in enumerate(waiting):
        seconds = job.left() - (len(waiting) - i - 1) * plan["seconds"]
        if seconds < TO_BEGIN:
            cut.append(name)
            continue
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        profile = arms(job.toy)[name]
        profile = profile.replace(train=profile.train.replace(**plan["arms"][name]))
        with _stop_after(seconds):
            run = run_profile(profile, folder / name, progress=False)
        if not isinstance(run, Run):
            cut.append(name)
            continue
        table.put(_scored(name, run))
        curves.put(_validated(name, run))
        last = table.find(name)[-1]
        print(
            f"  {name}: {last['updates']} updates in {last['seconds']:.0f} s, test "
            f"{last['word_ppl']:.1f} a word, {last['parameters'] / 1e6:.1f}M parameters",
            flush=True,
        )
    if cut:
        raise Unfinished(f"no time was left to end {', '.join(cut)}")


def _plan(job: Job, path: Path) -> dict[str, Any]:
    """The updates of each arm, and the seconds that one takes in all, as first planned."""
    device = run_environment()["device"]
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["device"] != device:
            raise InputError(
                f"{path.parent} was begun on {plan['device']}, this is {device}; equal minutes "
                "need one kind of machine: use another folder"
            )
        return plan
    found = {}
    for name, arm in arms(job.toy).items():
        often = arm.train.replace(updates=VALIDATIONS, eval_every=1)
        found[name] = predict(arm.replace(train=often))
    slowest = max(arm.update_seconds for arm in found.values())
    in_all = (1 - SPARE) * job.left() / len(found)
    seconds = in_all - max(arm.evaluation_seconds for arm in found.values())  # of updates
    seconds = min(seconds, TOY_UPDATES * slowest) if job.toy else seconds
    if seconds < max(TO_BEGIN * (not job.toy), VALIDATIONS * slowest):
        raise Unfinished("no time was left to train")
    plan: dict[str, Any] = {"device": device, "seconds": in_all, "arms": {}}
    for name, arm in found.items():
        updates = round(seconds / arm.update_seconds)
        often = -(-updates // VALIDATIONS)
        settings = {"updates": updates, "eval_every": often, "checkpoint_every": often}
        plan["arms"][name] = settings
        print(f"  {name}: {updates} updates of {arm.update_seconds:.4f} s", flush=True)
    write_json(path, plan)
    return plan


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


def _scored(name: str, run: Run) -> list[Row]:
    """A row for each split and exit of the best checkpoint, honestly scored."""
    made, model = run.manifest, config_from_dict(run.manifest["model"])
    settings = ("batch_size", "seq_len", "weight_decay", "optimizer", "max_lr")
    common = {
        "arm": name,
        "parameters": made["parameters"],
        "multiply_adds": cost_of_a_token(model, made["train"]["seq_len"]),
        "layers": model.n_loops,
        "d_model": model.d_model,
        "dropout": model.dropout,
        **{setting: made["train"][setting] for setting in settings},
        "precision": made["precision"]["name"],
        "updates": len(run.timing),
        "tokens_seen": run.metrics[-1]["tokens"],
        "seconds": made["seconds"],
        "mfu": made["mfu"],
        "memory": made["peak_memory_bytes"],
        "device": made["environment"]["device"],
    }
    return [common | row for row in run.results if row["protocol"] == "honest"]


def _validated(name: str, run: Run) -> list[Row]:
    """A row a validation."""
    seconds = {row["update"]: row["seconds"] for row in run.timing}
    loss = f"valid_loss_{config_from_dict(run.manifest['model']).n_loops}"
    return [
        {"arm": name, "update": row["update"], "tokens_seen": row["tokens"]}
        | {"seconds": seconds[row["update"]], "valid_loss": row[loss]}
        for row in run.metrics
        if loss in row
    ]
