"""`crt sweep`: notebooks over a grid of parameters, here or on a cluster; the rows of all."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crt_lib.book.pipeline import make_tasks, reproduce, run_all, say
from crt_lib.book.task import NotebookError
from crt_lib.files import InputError, read_rows, write_rows


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

    A point has the folder `out/a=1,b=2`, as `reproduce` makes it. `out/sweep.csv` has the rows of
    every results.csv found there, after the point's values, `grid_a` and so on, and the folder's
    name, `run`. `scheduler`: the address of a Dask scheduler whose workers share this file system;
    they run the points in place of `jobs` notebooks here. Raises InputError for a bad grid before
    anything runs, NotebookError when points failed, those that ended well being kept.
    """
    out = Path(out).absolute()
    if not grid or not all(grid.values()):
        raise InputError("the grid is empty; give a parameter and its values, as seed=0,1,2")
    points, tasks = {}, []
    for values in itertools.product(*map(dict.fromkeys, grid.values())):
        point = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={value}" for key, value in point.items())
        if "/" in name or len(name.encode()) > 200:
            raise InputError(f"the folder of a point cannot be called {name!r}; use plain values")
        points[out / name] = point
        tasks += make_tasks(
            profile, notebooks_dir, out / name, notebooks, point, False, prefix=f"{name}/"
        )
    try:
        if scheduler is None:
            run_all(tasks, jobs, echo)
        else:
            found = tasks[0].notebook.path.parent
            run_point = partial(reproduce, profile, notebooks_dir=found, only=notebooks)
            _run_on_cluster(run_point, points, scheduler, echo)
    finally:
        rows = _gather(points)
        if rows:
            write_rows(out / "sweep.csv", rows)
    return rows


def _gather(points: Mapping[Path, Mapping[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for folder, point in points.items():
        own = {f"grid_{key}": value for key, value in point.items()}
        for path in sorted(folder.glob("*/results.csv")):
            rows += [own | {"run": path.parent.name} | row for row in read_rows(path)]
    return rows


def _run_on_cluster(
    run_point: Callable[..., None],
    points: Mapping[Path, Mapping[str, str]],
    scheduler: str,
    echo: Callable[[str], None],
) -> None:
    """The points on Dask's workers; those of a worker that dies are run again on another."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise InputError("a cluster needs Dask; pip install 'crt-lm[cluster]'") from error
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {scheduler}: {error}") from error
    failed: list[str] = []
    with client:
        futures = {
            client.submit(run_point, out=folder, parameters=point, pure=False): folder.name
            for folder, point in points.items()
        }
        for ended, future in enumerate(as_completed(futures), 1):
            if future.status == "finished":
                echo(f"{ended - len(failed)}/{len(points)} {futures[future]}")
            else:
                failed.append(f"{futures[future]}: {future.exception()}")
    if failed:
        raise NotebookError("\n".join(failed))
