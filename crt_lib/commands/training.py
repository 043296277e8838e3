"""The commands that train and score: `crt train`, `distil`, `evaluate`, `average`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crt_lib.commands import options
from crt_lib.runs.profiles import load_profile

if TYPE_CHECKING:
    from crt_lib.runs.run import Run

app = typer.Typer()


@app.command()
def train(
    profile: options.ProfileName = "quick",
    recipe: options.Recipe = None,
    corpus: options.Corpus = None,
    tokenizer: options.Tokenizer = None,
    out: Annotated[Path | None, typer.Option(help="Default results/<profile>/<recipe>.")] = None,
    changes: options.Changes = None,
    fresh: Annotated[bool, typer.Option(help="Start over instead of resuming.")] = False,
    log_with: Annotated[
        list[str] | None,
        typer.Option(help="Also log to tensorboard, trackio, wandb, ... (repeatable)."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    vram_limit: Annotated[float | None, typer.Option(help="GPU memory at most, in GB.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say time and memory.")] = False,
) -> None:
    """Train and evaluate a profile; go on where an interrupted run stopped."""
    given = options.settings(changes)
    if precision is not None:
        given["train.precision"] = precision
    chosen = options.change_profile(load_profile(profile, recipe), corpus, tokenizer, given)

    from crt_lib.runs.machine import limit_memory
    from crt_lib.runs.run import run_profile

    if vram_limit is not None:
        limit_memory(vram_limit)
    if dry_run:
        from crt_lib.bench.dryrun import predict

        typer.echo(predict(chosen, vram_limit))
        return
    out = out or Path("results") / profile / chosen.recipe
    how: dict[str, Any] = {"resume": not fresh, "progress": not quiet}
    _tell(run_profile(chosen, out, log_with=log_with or (), **how), out)


@app.command()
def distil(
    run: options.Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder for the model that comes of it.")],
    teachers: Annotated[
        list[Path] | None,
        typer.Option("--teacher", help="A run or checkpoint (repeatable); default: RUN itself."),
    ] = None,
    share: Annotated[float, typer.Option(help="Of the teachers; the rest is the text's.")] = 1.0,
    written: Annotated[bool, typer.Option(help="Learn from text that teachers write.")] = False,
    changes: options.Changes = None,
    fresh: Annotated[bool, typer.Option(help="Start over instead of resuming.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train a model on until its early exits say what the last one says, and evaluate it."""
    given = options.by_part(options.settings(changes), "train")["train"]

    from crt_lib.runs.distilled import distil_run

    how: dict[str, Any] = {"resume": not fresh, "progress": not quiet, "settings": given}
    _tell(distil_run(run, out, teachers=teachers or (), share=share, written=written, **how), out)


def _tell(run: "Run | str | None", out: Path) -> None:
    """What came of a training; leaves where it was stopped or only helped."""
    from crt_lib.runs.scores import results_table

    if isinstance(run, str):
        raise typer.Exit(0)
    if run is None:
        typer.echo(f"stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(143)
    typer.echo(results_table(out / "results.csv"))
    typer.echo(f"curves, results and manifest: {out}")


@app.command()
def evaluate(
    checkpoint: options.Checkpoint,
    corpus: options.Corpus = None,
    tokenizer: options.Tokenizer = None,
    split: options.Split = "test",
    protocol: Annotated[str, typer.Option(help="honest, released or deployable.")] = "honest",
    seq_len: Annotated[int | None, typer.Option(help="Positions a window or line.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored a window (honest).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an exit.")] = False,
    out: options.Table = None,
) -> None:
    """Perplexity and bits per byte of every exit of a checkpoint."""
    from crt_lib.runs.scores import evaluate_checkpoint

    rows = evaluate_checkpoint(
        checkpoint, corpus, tokenizer, split, protocol=protocol, seq_len=seq_len, stride=stride
    )
    options.show_rows(rows, out, as_json)


@app.command()
def average(
    run: Annotated[Path, typer.Argument(help="Folder of a run with --set train.keep_every=N.")],
    last: Annotated[int, typer.Option(help="How many of the last kept ones.", min=1)] = 5,
) -> None:
    """Average the weights of a run's last kept checkpoints into one, to be evaluated as another."""
    from crt_lib.runs.trained import average_run

    typer.echo(f"average: {average_run(run, last)}")
