"""`crt reproduce`: run the numbered notebooks, keep their outputs, continue where it stopped."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crt_lib.book.notebooks import find_notebooks
from crt_lib.book.task import NotebookError, Task
from crt_lib.files import InputError, read_rows, stop_signals
from crt_lib.runs.manifest import checkout_root, read_manifest, update_manifest
from crt_lib.runs.profiles import load_profile

PACKAGES = ("papermill", "nbconvert", "ipykernel", "psutil")
PERIOD = 15.0  # seconds between lines where there is no terminal
PATIENCE = 5.0  # seconds that a kernel has to end
SET_BY_PIPELINE = ("profile", "results", "fresh")


def say(line: str) -> None:
    """Print a line, above the one that changes."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def reproduce(
    profile: str = "quick",
    *,
    notebooks_dir: Path | None = None,
    out: Path | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    fresh: bool = False,
    jobs: int = 1,
    echo: Callable[[str], None] = say,
) -> None:
    """Run the notebooks of `notebooks_dir` into `out`, `results/<profile>` by default.

    In order, up to `jobs` at a time, each after those it needs. One that is done in the manifest,
    with the same source, library and parameters, is skipped; `fresh` runs all again. `parameters`
    (values of their type, or text) go to the notebooks that declare them in their cell tagged
    `parameters`, as do `profile`, `results` (the absolute path of `out`) and `fresh`.

    Writes `out/notebooks/NN_name.ipynb` and `.html`, and `out/manifest.json`. Raises InputError,
    with nothing run, for bad input; NotebookError if a notebook fails.
    """
    tasks = make_tasks(profile, notebooks_dir, out, only, parameters or {}, fresh)
    run_all(tasks, jobs, echo)
    from crt_lib.runs.scores import results_table  # it loads torch: only now

    out = tasks[0].out
    for path in sorted(out.glob("*/results.csv")):
        echo(f"\n{path.parent.name}\n{results_table(path)}")
    echo(f"\nexecuted notebooks and HTML: {out / 'notebooks'}")
    if (out / "figures").is_dir():
        echo(f"figures: {out / 'figures'}")
    echo(f"record of the run: {out / 'manifest.json'}")


def make_tasks(
    profile: str,
    notebooks_dir: Path | None,
    out: Path | None,
    only: Sequence[str],
    given: Mapping[str, Any],
    fresh: bool,
    prefix: str = "",
) -> list[Task]:
    """What `reproduce` runs with these arguments; raises InputError as it does."""
    load_profile(profile)
    if own := set(given).intersection(SET_BY_PIPELINE):
        raise InputError(f"parameter {min(own)!r} is set by the pipeline; use its own option")
    for package in PACKAGES:
        if not find_spec(package):
            raise InputError(f"notebooks need {package}; pip install 'crt-lm[notebooks]'")
    results = checkout_root() / "results"
    notebooks = find_notebooks((notebooks_dir or results.with_name("notebooks")).absolute(), only)
    out = (out or results / profile).absolute()
    declared = sorted({name for notebook in notebooks for name in notebook.parameters})
    if unknown := set(given).difference(declared):
        raise InputError(
            f"unknown parameter {min(unknown)!r}; the notebooks to run declare "
            f"{', '.join(declared)}, in their cells tagged `parameters`"
        )
    all_given = {**given, "profile": profile, "results": str(out), "fresh": fresh}

    took: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError):
        rows = read_rows(results / "notebooks.csv")
        took = {row["notebook"]: row["seconds"] for row in rows if row["profile"] == profile}
    entries = read_manifest(out, profile).get("notebooks", {})
    took |= {name: e["seconds"] for name, e in entries.items() if e["status"] == "done"}
    tasks: list[Task] = []
    for notebook in notebooks:
        name, values = notebook.name, notebook.values(all_given)
        needs = tuple(task for task in tasks if task.notebook.name in notebook.after)
        expected = took.get(name)
        tasks.append(Task(notebook, values, out, profile, fresh, expected, needs, prefix + name))
    return tasks


def run_all(tasks: Sequence[Task], jobs: int, echo: Callable[[str], None] = say) -> None:
    """Run `tasks`, up to `jobs` at a time, each after those it needs; the longest chain first.

    Says where they are: on a terminal in a line that changes, else every 15 seconds. On a failure
    no more are begun. Raises InputError for `jobs` below 1, NotebookError with what the failed ones
    said, KeyboardInterrupt when a signal has stopped them.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    for out, profile in dict.fromkeys((task.out, task.profile) for task in tasks):
        update_manifest(out, profile, {})  # or an error, before any runs
    waiting = list(tasks)
    done: set[Task] = set()
    failed: list[str] = []
    running: dict[Future[str], Task] = {}
    line, due = tqdm(disable=None, leave=False, file=sys.stdout, bar_format="{desc}"), 0.0
    with stop_signals() as stopped, ThreadPoolExecutor(jobs) as pool, line:
        try:
            while (running or (waiting and not failed)) and not stopped.is_set():
                able = [task for task in waiting if done.issuperset(task.needs)]
                if jobs > 1:
                    able.sort(key=lambda task: -_chain(task, waiting))
                threads = _threads(jobs, len(running) + len(able))
                for task in able[: 0 if failed else jobs - len(running)]:
                    waiting.remove(task)
                    task.begun, due = time.monotonic(), 0.0
                    running[pool.submit(task.run, stopped, threads)] = task
                for future in wait(running, 0.2, FIRST_COMPLETED).done:
                    task, error = running.pop(future), future.exception()
                    if isinstance(error, NotebookError | InputError):
                        failed.append(str(error))
                        continue
                    done.add(task)
                    echo(f"{f'{len(done)}/{len(tasks)} {task.label}':<32} {future.result()}")
                places = "; ".join(task.watch() for task in running.values())
                line.set_description_str(f"{len(done)}/{len(tasks)} done; {places}")
                if line.disable and running and time.monotonic() >= due:
                    echo(line.desc)
                    due = time.monotonic() + PERIOD
            if stopped.is_set():
                echo("interrupted; the same command goes on")
                raise KeyboardInterrupt
        finally:
            stopped.set()
            _end(running)
    if failed:
        raise NotebookError("\n".join(failed))


def _chain(task: Task, waiting: Sequence[Task]) -> int:
    """The most that must run one after the other from `task` on, itself counted."""
    return 1 + max((_chain(other, waiting) for other in waiting if task in other.needs), default=0)


def _threads(jobs: int, able: int) -> dict[str, str]:
    """The environment of one of `able` notebooks: its share of the processors, unless that is set.

    One alone has all of them.
    """
    share = max(1, (os.cpu_count() or 1) // max(1, min(jobs, able)))
    return {} if jobs == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share)}


def _end(running: Mapping[Future[str], Task]) -> None:
    """End the kernels of those that run, and wait for them.

    They are told again and again: a training takes the first word as one to save, and then ends its
    cell, not its kernel.
    """
    import psutil

    late = time.monotonic() + PATIENCE
    while not all(future.done() for future in running):
        for process in (process for task in running.values() for process in task.processes()):
            with contextlib.suppress(psutil.Error):
                process.kill() if time.monotonic() > late else process.terminate()
        wait(running, 0.3)
