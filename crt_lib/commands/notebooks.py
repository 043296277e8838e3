"""The commands that run the notebooks: `crt reproduce`, `sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from crt_lib.commands.options import Notebooks, ProfileName, key_value

app = typer.Typer()


@app.command()
def reproduce(
    profile: ProfileName = "quick",
    only: Annotated[list[str] | None, typer.Option(help="Only this notebook (repeatable).")] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", help="A notebook parameter.", metavar="NAME=VALUE"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default results/<profile>.")] = None,
    fresh: Annotated[bool, typer.Option(help="Run again what is already done.")] = False,
    notebooks: Notebooks = None,
    jobs: Annotated[int, typer.Option(help="Notebooks at a time.", min=1)] = 1,
) -> None:
    """Run the numbered notebooks; go on where an interrupted run stopped."""
    given = dict(key_value(text) for text in parameters or [])
    from crt_lib.book.pipeline import reproduce as run_notebooks

    run_notebooks(
        profile,
        notebooks_dir=notebooks,
        out=out,
        only=only or (),
        parameters=given,
        fresh=fresh,
        jobs=jobs,
    )


@app.command()
def sweep(
    notebooks: Annotated[list[str], typer.Argument(help="Notebooks to run at every point.")],
    grid: Annotated[
        list[str],
        typer.Option(help="A parameter and its values (repeatable).", metavar="NAME=V,V"),
    ],
    out: Annotated[Path, typer.Option(help="Folder; each point has one of its own there.")],
    profile: ProfileName = "quick",
    folder: Notebooks = None,
    jobs: Annotated[int, typer.Option(help="Notebooks at a time, on this machine.", min=1)] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler that runs them instead.")
    ] = None,
) -> None:
    """Run notebooks over a grid of parameters; go on where an interrupted sweep stopped."""
    values: dict[str, list[str]] = {}
    for name, text in map(key_value, grid):
        values[name] = values.get(name, []) + [value.strip() for value in text.split(",")]

    from crt_lib.book.sweep import sweep as run_sweep

    rows = run_sweep(
        notebooks,
        values,
        out,
        profile=profile,
        notebooks_dir=folder,
        jobs=jobs,
        scheduler=scheduler,
    )
    typer.echo(f"{len(rows)} rows of results: {out / 'sweep.csv'}" if rows else f"done: {out}")
