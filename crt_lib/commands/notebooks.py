"""The commands that run the notebooks: `crt reproduce`, `sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from crt_lib.commands import options

app = typer.Typer()


@app.command()
def reproduce(
    profile: options.ProfileName = "quick",
    only: Annotated[list[str] | None, typer.Option(help="Only this notebook (repeatable).")] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", help="A notebook parameter.", metavar="NAME=VALUE"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default results/<profile>.")] = None,
    fresh: Annotated[bool, typer.Option(help="Run again what is already done.")] = False,
    notebooks: options.Notebooks = None,
    jobs: Annotated[int, typer.Option(help="Notebooks at a time.", min=1)] = 1,
) -> None:
    """Run the numbered notebooks; go on where an interrupted run stopped."""
    given = dict(map(options.key_value, parameters or []))
    how: dict[str, Any] = {"out": out, "only": only or (), "parameters": given}
    how |= {"fresh": fresh, "notebooks_dir": notebooks}
    if jobs == 1:
        from crt_lib.book.pipeline import reproduce as run_notebooks

        run_notebooks(profile, **how)
    else:
        from crt_lib.book.batch import reproduce_parallel

        reproduce_parallel(profile, jobs, **how)


@app.command()
def sweep(
    notebooks: Annotated[list[str], typer.Argument(help="Notebooks to run at every point.")],
    grid: Annotated[
        list[str],
        typer.Option(help="A parameter and its values (repeatable).", metavar="NAME=V,V"),
    ],
    out: Annotated[Path, typer.Option(help="Folder; each point has one of its own there.")],
    profile: options.ProfileName = "quick",
    folder: options.Notebooks = None,
    jobs: Annotated[int, typer.Option(help="Points at a time, on this machine.", min=1)] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler that runs them instead.")
    ] = None,
) -> None:
    """Run notebooks over a grid of parameters; go on where an interrupted sweep stopped."""
    values: dict[str, list[str]] = {}
    for name, text in map(options.key_value, grid):
        values[name] = values.get(name, []) + [value.strip() for value in text.split(",")]

    from crt_lib.book.batch import sweep as run_sweep

    how: dict[str, Any] = {"profile": profile, "notebooks_dir": folder, "jobs": jobs}
    rows = run_sweep(notebooks, values, out, scheduler=scheduler, **how)
    typer.echo(f"{len(rows)} rows of results: {out / 'sweep.csv'}" if rows else f"done: {out}")
