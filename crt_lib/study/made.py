"""What stands under results/, which command made each file, and what is missing or stale."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from safetensors import SafetensorError, safe_open

from crt_lib.checkpoint import read_metrics
from crt_lib.config import TrainConfig, config_from_dict
from crt_lib.files import InputError, read_rows
from crt_lib.runs.manifest import read_manifest
from crt_lib.study.ladder import choose_arms
from crt_lib.study.search import documents_file, grid
from crt_lib.study.sota import chosen
from crt_lib.study.trial import Trial

LIST = "made.csv"  # columns: path, minutes, of, needs, command


class Made(NamedTuple):
    """A file or a run's folder under results/, and how it is made: a row of LIST."""

    path: str  # below results/
    minutes: float  # about, on two processor cores
    of: str  # the run whose best checkpoint it measured, or belongs to, or ""
    needs: str  # the columns of a table, the files of a run, that are read; words
    command: str

    def fault(self, results: Path) -> str | None:
        """Why it has to be made: missing, or stale and in what; None where it is as expected."""
        path, needs = results / self.path, self.needs.split()
        if not path.exists():
            return "missing"
        if path.is_dir():
            return _run_fault(path, needs)
        if path.name == "search.csv":
            return _search_fault(path)
        try:
            columns = next(iter(read_rows(path)), {}) if needs else {}
            if lacking := [name for name in needs if name not in columns]:
                return f"stale: it lacks {', '.join(lacking)}"
            if self.of:
                best = results / self.of / "checkpoints/best.safetensors.sha256"
                said = {name.removeprefix("s") for name in _checkpoints(path)}
                if said != {best.read_text().split()[0]}:
                    return f"stale: it measured another checkpoint than that of {self.of}"
        except (OSError, AttributeError, TypeError, ValueError, KeyError, SafetensorError) as error:
            return f"stale: it cannot be read ({type(error).__name__})"
        return None


def _checkpoints(path: Path) -> set[str]:
    """The digests of checkpoints that a table, a JSON file, a gate or a trace says it is of."""
    if path.suffix == ".csv":
        return {row["checkpoint"] for row in read_rows(path)}
    if path.suffix == ".json":
        return {json.loads(path.read_text(encoding="utf-8"))["checkpoint"]}
    with safe_open(path, framework="numpy") as file:
        said = [json.loads(text) for text in file.metadata().values()]
    return {about.get("about", about)["checkpoint"] for about in said}  # a trace has it inside


def _run_fault(folder: Path, needs: Sequence[str]) -> str | None:
    lacking = [name for name in ("config.json", *needs) if not (folder / name).exists()]
    if lacking:
        return f"missing: {', '.join(lacking)}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config_from_dict(config["model"])
        TrainConfig.from_dict(config["train"])
    except (InputError, KeyError, ValueError) as error:
        return f"stale: {error}"
    return None


def read_plan(path: Path) -> dict[bool, list[Trial]]:
    """The trials of a table with arm, budget, max_lr, seeds and documents, by `documents`."""
    trials: dict[bool, list[Trial]] = {False: [], True: []}
    plan = pd.read_csv(path)
    arms = choose_arms(list(plan["arm"].unique()))
    for row in plan.itertuples():
        amount, unit = row.budget.split()
        budget = {"minutes": float(amount)} if unit == "min" else {"updates": int(amount)}
        seeds = [int(seed) for seed in str(row.seeds).split()]
        trials[row.documents] += grid({row.arm: arms[row.arm]}, [row.max_lr], seeds, **budget)
    return trials


def _search_fault(path: Path) -> str | None:
    missing, plan = 0, read_plan(path.with_name("search_plan.csv"))
    for documents, trials in plan.items():
        table = documents_file(path) if documents else path
        rows = read_rows(table) if table.exists() else []
        missing += sum(trial.row(rows) is None for trial in trials)
    total = sum(map(len, plan.values()))
    return f"missing: {missing} of {total} trainings, or changed" if missing else None


def read_list(results: Path) -> list[Made]:
    """The rows of results/made.csv; raises InputError where there is none."""
    path = results / LIST
    if not path.is_file():
        raise InputError(f"no {path}; give the folder results/ of a checkout")
    table = pd.read_csv(path, keep_default_na=False)
    return [Made(*row) for row in table[list(Made._fields)].itertuples(index=False)]


def provenance(folder: Path) -> tuple[str, str]:
    """Of a run: which update's weights are scored, of how many, and the commit that trained it.

    Both are "" for what is no run.
    """
    if not (folder / "manifest.json").is_file():
        return "", ""
    update, code = "not kept", read_manifest(folder)["train"]["environment"]["git"]
    if (folder / "metrics.jsonl").exists():
        metrics = read_metrics(folder)
        update = f"{chosen(metrics)['update']:,} of {metrics[-1]['update']:,}"
    return update, f"`{code['commit'][:7]}`{', modified' * code['dirty']}"


def check(results: Path) -> None:
    """Raises InputError, naming the command, for the first stale file."""
    for made in read_list(results):
        fault = made.fault(results)
        if fault and fault.startswith("stale"):
            raise InputError(f"{results / made.path} is {fault}; make it anew: {made.command}")


def remake(results: Path, *, run: bool, echo: Callable[[str], None] = print) -> int:
    """List what is missing or stale with the time it takes and, with `run`, make it in this order.

    A command that was interrupted goes on when it is called again. Returns how many are left to
    make; raises InputError when a command fails.
    """
    every = read_list(results)
    faults = {made: fault for made in every if (fault := made.fault(results))}
    for made, fault in faults.items():
        echo(f"{made.path}: {fault}; about {made.minutes:g} minutes: {made.command}")
    minutes = sum({made.command: made.minutes for made in faults}.values())
    took = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:g} minutes"
    echo(f"{len(every) - len(faults)} of {len(every)} are there; the others take {took}")
    if not run:
        return len(faults)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in dict.fromkeys(made.command for made in faults):
        echo(f"$ {command}")
        # of results/made.csv, which is code of this repository
        environment = os.environ | {"PATH": tools}
        if subprocess.run(command, shell=True, env=environment).returncode:  # nosec B602
            raise InputError(f"failed: {command}; `make results` goes on there")
    return sum(made.fault(results) is not None for made in every)
