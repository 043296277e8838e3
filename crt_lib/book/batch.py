"""Many runs of notebooks: several at a time, a grid of parameters, on this machine or a cluster.

A job is one `crt reproduce` in a process of its own. What it has finished is not done again, so
whatever stops or kills some of them, the same command goes on; a lock keeps two from the same
notebook in the same folder.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.book.notebooks import check_parameters, find_notebooks
from crt_lib.book.pipeline import (
    NotebookError,
    check_run,
    ended_by_sigterm,
    refuse_own,
    reproduce_words,
    summarise_run,
)
from crt_lib.book.progress import LiveLine, elapsed, joined, say, where
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.runs.manifest import Manifest, checkout_root


@dataclass(frozen=True)
class Job:
    """A call of `crt reproduce` with `words`, to be begun when those named in `after` are done.

    `running`: the path, or the pattern of paths, of the notebook that it executes.
    """

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    running: Path | None = None


def reproduce_parallel(
    profile: str,
    jobs: int,
    *,
    notebooks_dir: Path | None = None,
    out: Path | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    fresh: bool = False,
    echo: Callable[[str], None] = say,
) -> Manifest:
    """As `pipeline.reproduce`, up to `jobs` notebooks at a time, each after those it needs.

    Arguments and errors are the same. With several jobs each has its share of the processors,
    unless OMP_NUM_THREADS says otherwise.
    """
    given = dict(parameters or {})
    plan = check_run(profile, notebooks_dir, out, only, given, fresh)
    names = {notebook.name for notebook in plan.notebooks}
    work = []
    for notebook in plan.notebooks:
        own = {name: value for name, value in given.items() if name in notebook.parameters}
        words = reproduce_words(profile, [notebook.name], own, plan.out, plan.folder, fresh)
        after = tuple(name for name in notebook.after if name in names)
        running = plan.out / "notebooks" / f"{notebook.name}.running.ipynb"
        work.append(Job(notebook.name, words, after, running))
    try:
        run_jobs(work, jobs, echo, plan.expected)
    finally:
        plan.manifest.save()  # with the parameters of all
    summarise_run(plan, echo)
    return plan.manifest


def sweep(
    notebooks: Sequence[str],
    grid: Mapping[str, Sequence[str]],
    out: str | Path,
    *,
    profile: str = "quick",
    notebooks_dir: Path | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    echo: Callable[[str], None] = say,
) -> list[dict[str, Any]]:
    """Run `notebooks` at every point of `grid`, parameter -> values as text; the rows of all.

    A point has the folder `out/a=1,b=2`, as `crt reproduce --out` makes it. `out/sweep.csv` has
    the rows of every results.csv found there, after the point's values, `grid_a` and so on, and the
    folder's name, `run`. `scheduler`: the
    address of a Dask scheduler whose workers share this file system; they run the points in place
    of `jobs` processes here. Raises InputError for a bad grid before anything runs, NotebookError
    when points failed, those that ended well being kept.
    """
    out = Path(out).absolute()
    if not grid or not all(grid.values()):
        raise InputError("the grid is empty; give a parameter and its values, as seed=0,1,2")
    refuse_own(grid)
    folder = Path(notebooks_dir or checkout_root() / "notebooks").absolute()
    found = find_notebooks(folder, notebooks)
    points = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        check_parameters(found, point)
        name = ",".join(f"{key}={value}" for key, value in point.items())
        if "/" in name or len(name.encode()) > 200:
            raise InputError(f"the folder of a point cannot be called {name!r}; use plain values")
        points[name] = point
    chosen = [notebook.name for notebook in found]
    work = []
    for name, point in points.items():
        words = reproduce_words(profile, chosen, point, out / name, folder, False)
        work.append(Job(name, words, running=out / name / "notebooks" / "*.running.ipynb"))
    try:
        if scheduler is None:
            run_jobs(work, jobs, echo)
        else:
            _run_on_cluster(work, scheduler, echo)
    finally:
        rows = _gather(out, points)
    return rows


def _gather(out: Path, points: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Write sweep.csv, if there is anything to write; its rows."""
    rows = []
    for name, point in points.items():
        for path in sorted((out / name).glob("*/results.csv")):
            own = {f"grid_{key}": value for key, value in point.items()}
            own["run"] = path.parent.name
            rows += [own | row for row in read_rows(path)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key) for key in columns} for row in rows]
    if rows:
        write_rows(out / "sweep.csv", rows)
    return rows


def run_jobs(
    work: Sequence[Job],
    jobs: int,
    echo: Callable[[str], None] = say,
    expected: Mapping[str, float] | None = None,
) -> None:
    """Run all, up to `jobs` at a time; on a failure no more are begun, and those running end.

    Says which run and where they are; `expected`: seconds by job, of those known. Raises
    InputError for `jobs` below 1 and for jobs that wait for each other; NotebookError with what the
    failed ones said. An interruption, or SIGTERM, reaches every running one.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    waiting = list(work)
    running: list[_Running] = []
    done: set[str] = set()
    failed: list[str] = []
    line, due = LiveLine(echo), 0.0
    with _all_stopped_with_this(running, line, echo):
        while running or (waiting and not failed):
            ready = [job for job in waiting if done.issuperset(job.after)]
            for job in ready[: 0 if failed else jobs - len(running)]:
                waiting.remove(job)
                running.append(_Running(job, environment))
                due = 0.0
            if not running:
                names = ", ".join(job.name for job in waiting)
                raise InputError(f"{names} wait for each other; see their metadata crt.after")
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                try:
                    seconds = one.wait()
                except NotebookError as error:
                    failed.append(str(error))
                    continue
                done.add(one.job.name)
                line.clear()
                echo(f"{f'{len(done)}/{len(work)} {one.job.name}':<32} {seconds:8.1f} s")
            if running and time.monotonic() >= due:
                places = [one.place((expected or {}).get(one.job.name)) for one in running]
                line.show(f"{len(done)}/{len(work)} done; {'; '.join(places)}")
                due = time.monotonic() + line.period
            time.sleep(0.05)
    if failed:
        raise NotebookError("\n".join(failed))


@contextlib.contextmanager
def _all_stopped_with_this(
    running: list["_Running"], line: LiveLine, echo: Callable[[str], None]
) -> Iterator[None]:
    """An interruption of the block, or SIGTERM, ends those running and waits for them."""
    try:
        with ended_by_sigterm():
            yield
    except BaseException:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
        line.clear()
        echo("interrupted; the same command goes on")
        raise
    finally:
        line.clear()


class _Running:
    """A job in a process of its own, which has begun."""

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job, self.begun = job, time.monotonic()
        # a pipe would fill up; closed by `wait`
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crt_lib.cli", *job.words],
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            env=dict(environment),
        )

    def place(self, expected: float | None) -> str:
        """Its name, the cell it is at and its seconds, of those expected."""
        path = self.job.running
        found = next(iter(path.parent.glob(path.name)), None) if path else None
        cell = where(found)[0] if found else ""
        return joined(self.job.name, cell, elapsed(self.begun, expected))

    def wait(self) -> float:
        """Its seconds; raises NotebookError with what it wrote, from its error on."""
        self.process.wait()
        seconds = time.monotonic() - self.begun
        with self.errors as file:
            file.seek(0)
            said = file.read().strip()
        if self.process.returncode:
            said = said[max(said.rfind("error: "), 0) :].removeprefix("error: ")
            raise NotebookError(said or f"{self.job.name} ended with {self.process.returncode}")
        return seconds


def _run_on_cluster(work: Sequence[Job], scheduler: str, echo: Callable[[str], None]) -> None:
    """The jobs on Dask's workers; those of a worker that dies are run again on another."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise InputError("a cluster needs Dask; pip install 'crt-lm[cluster]'") from error
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {scheduler}: {error}") from error
    failed, done = [], 0
    with client:
        futures = {client.submit(run_job, job, pure=False): job for job in work}
        for future in as_completed(futures):
            job = futures[future]
            if future.status == "finished":
                done += 1
                echo(f"{f'{done}/{len(work)} {job.name}':<32} {future.result():8.1f} s")
            else:
                failed.append(f"{job.name}: {future.exception()}")
    if failed:
        raise NotebookError("\n".join(failed))


def run_job(job: Job) -> float:
    """Run one job and wait for it; its seconds. Raises NotebookError with what it said."""
    return _Running(job, os.environ).wait()
