"""`crt gpu`, part training: `crt2` and a GPT-2 of equal multiply-adds, the same minutes each.

Both read WikiText-2's words in the same order, in the same batches, with the same dropout and
weight decay; the learning rate of each is half of what was best for it at half the width
(results/small), not tuned here. Its pace is measured first, so that the rate ends where the minutes
do.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crt_lib.bench.dryrun import predict
from crt_lib.bench.gpt2 import cost_of_a_token, matched
from crt_lib.bench.table import put_rows, rows_of
from crt_lib.files import InputError, write_json
from crt_lib.gpu.parts import Job, Row, say
from crt_lib.runs.manifest import run_environment
from crt_lib.runs.profiles import Profile, load_profile
from crt_lib.runs.run import Run, run_profile

VALIDATIONS = 6  # of an arm, with a checkpoint each
SPARE = 0.1  # of the time, for reading the text and what was not foreseen
TOY_UPDATES = 60  # that an arm makes in a rehearsal
DROPOUT, WEIGHT_DECAY = 0.3, 0.1
WORDS = 33_278  # of WikiText-2


def arms(toy: bool) -> dict[str, Profile]:
    """`crt2` of 24M parameters, and the GPT-2 of its width that has the nearest multiply-adds."""
    crt2, gpt2 = (load_profile("smoke" if toy else "small", name) for name in ("crt2", "gpt2"))
    theirs = gpt2.model.replace(vocab_size=crt2.model.vocab_size)
    if not toy:
        size = {"d_model": 512, "max_seq_len": 256, "dropout": DROPOUT, "vocab_size": WORDS}
        ours = crt2.model.replace(**size, embed_dim=512, embed_dropout=DROPOUT)
        theirs = gpt2.model.replace(**size, n_heads=ours.n_heads)
        settings = crt2.train.replace(batch_size=32, weight_decay=WEIGHT_DECAY, precision="bf16")
        rates = {arm.recipe: settings.replace(max_lr=arm.train.max_lr / 2) for arm in (crt2, gpt2)}
        crt2 = crt2.replace(tokenizer="word", model=ours, train=rates["crt2"])
        gpt2 = crt2.replace(recipe="gpt2", train=rates["gpt2"])
    cost = partial(cost_of_a_token, seq_len=crt2.train.seq_len)
    equal = matched(theirs, crt2.model, cost)
    return {"crt2": crt2, "gpt2": gpt2.replace(model=equal)}


def run_training(job: Job) -> None:
    """Train and score each arm, in training/: rows of training.csv, and of curves.csv.

    Raises RuntimeError when one was stopped; the next call goes on from its checkpoint with the
    plan that it began with.
    """
    folder, chosen, table = job.out / "training", arms(job.toy), job.out / "training.csv"
    for name, settings in _plan(job, chosen, folder / "plan.json").items():
        if rows_of(table, arm=name):
            continue
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        profile = chosen[name].replace(train=chosen[name].train.replace(**settings))
        run = run_profile(profile, folder / name, progress=False)
        if not isinstance(run, Run):
            raise RuntimeError(f"the training of {name} was stopped")
        scored, validated = _rows(name, profile, run)
        put_rows(job.out / "curves.csv", validated, ["arm"])
        put_rows(table, scored, ["arm"])
        last = scored[-1]
        say(
            f"  {name}: {last['updates']} updates in {last['seconds']:.0f} s, test "
            f"{last['word_ppl']:.1f} a word"
        )


def _plan(job: Job, chosen: dict[str, Profile], path: Path) -> dict[str, Any]:
    """The settings of each arm that make its training last as long, as first planned."""
    device = run_environment()["device"]
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["device"] != device:
            raise InputError(
                f"{path.parent} was begun on {plan['device']}, this is {device}; equal minutes "
                "need one kind of machine: use another folder"
            )
        return plan["arms"]
    found = {}
    for name, arm in chosen.items():
        settings = arm.train.replace(updates=VALIDATIONS, eval_every=1)
        found[name] = predict(arm.replace(train=settings))
    slowest = max(arm.update_seconds for arm in found.values())
    halts = max(arm.evaluation_seconds for arm in found.values())
    seconds = (1 - SPARE) * (job.until - time.time()) / len(found) - halts  # of updates
    seconds = min(seconds, TOY_UPDATES * slowest) if job.toy else seconds
    if seconds < VALIDATIONS * slowest:
        raise RuntimeError("no time was left to train")
    plan = {}
    for name, predicted in found.items():
        updates = round(seconds / predicted.update_seconds)
        often = -(-updates // VALIDATIONS)
        plan[name] = {"updates": updates, "eval_every": often, "checkpoint_every": often}
        say(f"  {name}: {updates} updates of {predicted.update_seconds:.4f} s")
    write_json(path, {"device": device, "arms": plan})
    return plan


def _rows(name: str, profile: Profile, run: Run) -> tuple[list[Row], list[Row]]:
    """A row a split and exit of the best checkpoint, honestly scored, and one a validation."""
    made, train, loops = run.manifest, profile.train, profile.model.n_loops
    arm: Row = {"arm": name, "layers": loops, "max_lr": train.max_lr}
    arm |= {name: made[name] for name in ("parameters", "seconds", "mfu", "peak_memory_bytes")}
    arm["multiply_adds"] = cost_of_a_token(profile.model, train.seq_len)
    arm |= {"updates": len(run.timing), "tokens_seen": run.metrics[-1]["tokens"]}
    arm |= {"precision": made["precision"]["name"], "device": made["environment"]["device"]}
    scored = [arm | row for row in run.results if row["protocol"] == "honest"]
    seconds = {row["update"]: row["seconds"] for row in run.timing}
    columns = ("arm", "update", "tokens_seen", "seconds", "valid_loss")
    validated = [
        (name, row["update"], row["tokens"], seconds[row["update"]], row[f"valid_loss_{loops}"])
        for row in run.metrics
        if f"valid_loss_{loops}" in row
    ]
    return scored, [dict(zip(columns, row, strict=True)) for row in validated]
