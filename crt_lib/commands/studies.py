"""What makes results and pages: `crt search`, `arena`, `claims`, `report`, `results`, and more."""

from pathlib import Path
from typing import Annotated, Any

import typer

from crt_lib.commands import options

app = typer.Typer()


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="CSV file; rows it has are not made again.")],
    arms: Annotated[
        list[str] | None,
        typer.Argument(help="Names or groups, as ladder, variants, baselines, paper-ablations."),
    ] = None,
    rates: Annotated[
        list[float] | None, typer.Option("--lr", help="Learning rate (repeatable).")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="CSV file of trainings, instead of arms and rates.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed (repeatable).")] = None,
    updates: Annotated[int | None, typer.Option(help="Equal tokens: updates of each.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Equal time: processor minutes.")] = None,
    jobs: options.Jobs = 1,
    threads: options.Threads = None,
    documents: Annotated[bool, typer.Option(help="Also score the documents of test.")] = False,
    tuned: Annotated[
        bool,
        typer.Option("--tune", help="Find each arm's best rate with the first seed, for the rest."),
    ] = False,
) -> None:
    """Train named configurations for equal tokens or equal time, and compare them on valid.

    With --tune an arm's rate is halved or doubled until its best has a worse one on either side.
    """
    from crt_lib.study.ladder import choose_arms
    from crt_lib.study.made import read_plan
    from crt_lib.study.search import grid, search as run_search, tune

    how: dict[str, Any] = {"jobs": jobs, "threads": threads}
    if plan is not None:
        for scored, trials in read_plan(plan).items():
            run_search(trials, out, documents=scored, **how)
        return
    chosen, rates, seeds = choose_arms(arms or []), rates or [], seeds or [0]
    how["documents"] = documents
    if tuned:
        tune(chosen, out, rates, seeds, updates=updates, minutes=minutes, **how)
    else:
        run_search(grid(chosen, rates, seeds, updates, minutes), out, **how)


@app.command()
def arena(
    name: Annotated[str, typer.Argument(help="One of results/arenas/rules.md.")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the rules, with a folder for each arena.")
    ] = Path("results/arenas"),
    jobs: options.Jobs = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only this arm (repeatable).")] = None,
    new_rules: Annotated[
        bool, typer.Option("--new-rules", help="Go on although the rules were changed.")
    ] = False,
) -> None:
    """Hold a looped block against what people would use instead, by rules written before.

    Every arm is tuned alike and trained with three seeds. A call goes on where one stopped.
    """
    from crt_lib.study.answers import score_answers
    from crt_lib.study.arena_runs import run_arena
    from crt_lib.study.arenas import find_arena

    arena_asked = find_arena(name)
    typer.echo(arena_asked.question)
    run_arena(name, folder, jobs=jobs, only=only or (), new_rules=new_rules)
    if not arena_asked.documents:
        score_answers(folder, name)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder; a second call goes on with what it lacks.")],
    minutes: Annotated[float, typer.Option(help="Of this call, in all.")] = 9.0,
    rehearse: Annotated[bool, typer.Option(help="All of it at toy size on the CPU.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only checks, memory, steps, decode or training (repeatable)."),
    ] = None,
) -> None:
    """Measure all that needs a GPU: checks, training steps, 6 GB, decoding, a training.

    Without typer: python -m crt_lib.gpu.
    """
    from crt_lib.gpu.run import run_gpu

    raise typer.Exit(run_gpu(out, minutes=minutes, rehearse=rehearse, only=only or ()))


@app.command()
def doctor() -> None:
    """Say what this machine is, whether the two commands will work on it, and how long they take.

    Ends with status 1 where something is in the way.
    """
    from crt_lib.study.doctor import examine

    broken = False
    for finding in examine():
        typer.echo(finding)
        broken |= finding.broken
    raise typer.Exit(int(broken))


@app.command()
def claims(results: options.Results = Path("results")) -> None:
    """Hold the paper's claims against the files under results/: claims.csv and claims.md there."""
    from crt_lib.study.claims import summary, write_claims

    rows = write_claims(results)
    for row in rows:
        values = " | ".join(row[name] for name in ("paper", "released", "honest"))
        typer.echo(f"{row['id']} {row['verdict']:<24} {row['claim']}: {values}")
    typer.echo(summary(rows))


@app.command()
def report(
    folder: Annotated[Path, typer.Option(help="Where the pages are.", exists=True)] = Path("."),
    results: options.Results = Path("results"),
    times: Annotated[
        Path | None,
        typer.Option(help="First take the notebooks' times from this run of `crt reproduce`."),
    ] = None,
) -> None:
    """Rewrite the tables of the pages from the files under results/."""
    from crt_lib.show.notebooks import record_times
    from crt_lib.show.pages import PAGES, update_page
    from crt_lib.study.made import check

    if times is not None:
        record_times(times, results)
    check(results)
    for name in PAGES:
        changed = update_page(folder / name, results)
        typer.echo(f"{folder / name}: {'updated' if changed else 'up to date'}")


@app.command("results")
def remake_results(
    folder: options.Results = Path("results"),
    only_list: Annotated[bool, typer.Option("--list", help="Only list, make nothing.")] = False,
) -> None:
    """List what is missing or stale under results/, and make it; go on where it stopped."""
    from crt_lib.study.made import remake

    raise typer.Exit(1 if remake(folder, run=not only_list) else 0)


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
    jobs: options.Jobs = 1,
) -> None:
    """Run the numbered notebooks; go on where an interrupted run stopped."""
    given = dict(map(options.key_value, parameters or []))
    from crt_lib.book.pipeline import reproduce as run_notebooks

    how: dict[str, Any] = {"out": out, "only": only or (), "parameters": given}
    run_notebooks(profile, notebooks_dir=notebooks, fresh=fresh, jobs=jobs, **how)


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
    jobs: options.Jobs = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler that runs them instead.")
    ] = None,
) -> None:
    """Run notebooks over a grid of parameters; go on where an interrupted sweep stopped."""
    values: dict[str, list[str]] = {}
    for name, text in map(options.key_value, grid):
        values[name] = values.get(name, []) + [value.strip() for value in text.split(",")]

    from crt_lib.book.sweep import sweep as run_sweep

    how: dict[str, Any] = {"profile": profile, "notebooks_dir": folder, "jobs": jobs}
    rows = run_sweep(notebooks, values, out, scheduler=scheduler, **how)
    typer.echo(f"{len(rows)} rows of results: {out / 'sweep.csv'}" if rows else f"done: {out}")
