"""The command line, `crt`: each function is a command."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from crt_lib.commands.bench import bench_app
from crt_lib.commands.options import (
    PLAIN_HELP,
    Changes,
    Corpus,
    Notebooks,
    ProfileName,
    Recipe,
    Results,
    Tokenizer,
    change_profile,
    key_value,
    short,
)
from crt_lib.config import load_profile
from crt_lib.files import InputError, RunError

app = typer.Typer(
    help="CRT: recursive language models with early exit, reproduced, audited and corrected.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=PLAIN_HELP,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    try:
        app()
    except InputError as error:
        _fail(error, 2)
    except (RunError, OSError) as error:
        _fail(error, 1)


@app.command()
def train(
    profile: ProfileName = "quick",
    recipe: Recipe = None,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default results/<profile>/<recipe>.")
    ] = None,
    changes: Changes = None,
    fresh: Annotated[bool, typer.Option(help="Start over instead of resuming.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    vram_limit: Annotated[
        float | None, typer.Option(help="Gigabytes of the GPU that may be used.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16; as --set train.precision.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: time and memory.")
    ] = False,
) -> None:
    """Train and evaluate a profile; go on where an interrupted run stopped."""
    chosen = load_profile(profile, recipe)
    chosen = change_profile(chosen, corpus, tokenizer, changes or [])
    if precision is not None:
        chosen = chosen.replace(train=chosen.train.replace(precision=precision))

    from crt_lib.book.pipeline import results_table
    from crt_lib.device import limit_memory
    from crt_lib.runs.run import run_profile

    if vram_limit is not None:
        limit_memory(vram_limit)
    if dry_run:
        from crt_lib.bench.dryrun import predict

        typer.echo(predict(chosen))
        return
    out = out or Path("results") / profile / chosen.recipe
    run = run_profile(chosen, out, resume=not fresh, progress=not quiet, tensorboard=tensorboard)
    if isinstance(run, str):
        raise typer.Exit(0)
    if run is None:
        typer.echo(f"stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(143)
    typer.echo(results_table(out / "results.csv"))
    typer.echo(f"curves, results and manifest: {out}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint file.")],
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    protocol: Annotated[str, typer.Option(help="honest, released or deployable.")] = "honest",
    seq_len: Annotated[int | None, typer.Option(help="Positions a window or line.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored a window (honest).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an exit.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this CSV file.")] = None,
) -> None:
    """Perplexity and bits per byte of every exit of a checkpoint."""
    from crt_lib.files import write_rows
    from crt_lib.runs.run import evaluate_checkpoint

    rows = evaluate_checkpoint(
        checkpoint, corpus, tokenizer, split, protocol=protocol, seq_len=seq_len, stride=stride
    )
    if out is not None:
        write_rows(out, rows)
    for row in rows:
        typer.echo(json.dumps(row) if as_json else "  ".join(f"{k} {short(row[k])}" for k in row))


@app.command()
def average(
    run: Annotated[Path, typer.Argument(help="Folder of a run with --set train.keep_every=N.")],
    last: Annotated[int, typer.Option(help="How many of the last kept ones.", min=1)] = 5,
) -> None:
    """Average the weights of a run's last kept checkpoints into one, to be evaluated as another."""
    from crt_lib.runs.run import average_run

    typer.echo(f"average: {average_run(run, last)}")


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint file.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more texts to continue.")],
    new_tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each.", min=0)] = 64,
    criterion: Annotated[
        str | None, typer.Option(help="Exit criterion; none runs every loop.")
    ] = None,
    tau0: Annotated[float, typer.Option(help="Threshold at the first loop (eq. 6).")] = 0.92,
    tau_min: Annotated[float, typer.Option(help="The lowest threshold.")] = 0.8,
    decay: Annotated[float, typer.Option(help="Of the threshold, by loop.")] = 0.98,
    exit_loop: Annotated[
        int | None, typer.Option(help="Every token leaves after it, or before by the criterion.")
    ] = None,
    draft_loop: Annotated[
        int | None, typer.Option(help="Lossless speculation, drafts by this exit.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most probable.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw within this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    quantize: Annotated[
        str | None, typer.Option(help="int8: large weights are read in 8 bits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
) -> None:
    """Continue texts, with exits or with lossless speculation if asked for."""
    from crt_lib.exits.decode import Sampling, Speculation
    from crt_lib.exits.decode import generate as run
    from crt_lib.exits.policy import Policy
    from crt_lib.runs.run import load_trained_model

    sampling = Sampling(temperature, top_k, top_p)
    policy = Policy(criterion, tau0, tau_min, decay, fixed=exit_loop)
    if draft_loop is not None and policy.leaves:
        raise InputError("--draft-loop runs every loop; leave out --criterion and --exit-loop")
    if draft_loop is not None and quantize is not None:
        raise InputError("--draft-loop keeps the text of float32; leave out --quantize")
    model, tokenizer, _ = load_trained_model(checkpoint)
    ids = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    if draft_loop is not None:
        draft = Speculation(model, draft_loop)
        made = [draft.generate(i, new_tokens, sampling=sampling, seed=seed) for i in ids]
    else:
        how = {"policy": policy, "sampling": sampling, "seed": seed, "quantize": quantize}
        made = run(model, ids, new_tokens, **how)
    for prompt, one in zip(prompts, made, strict=True):
        text = tokenizer.decode(one.tokens)
        mean = sum(one.loops) / max(len(one.loops), 1)
        if as_json:
            typer.echo(json.dumps({"prompt": prompt, "text": text, "loops": one.loops}))
        else:
            typer.echo(f"{prompt}{text}\n[{len(one.tokens)} tokens, {mean:.2f} loops each]")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint file.")],
    out: Annotated[
        Path, typer.Argument(help="A folder for transformers, or a file ending in .pt2.")
    ],
    exit_loop: Annotated[
        int | None, typer.Option(help="Exit of the .pt2 program; the last by default.")
    ] = None,
) -> None:
    """Write a model as a folder that transformers loads, or as a torch.export program."""
    from crt_lib.hf.export import export_run

    typer.echo(f"exported: {export_run(checkpoint, out, exit_loop)}")


@app.command(name="lm-task")
def lm_task(
    out: Annotated[Path, typer.Argument(help="Folder for the task; it will hold the text.")],
    corpus: Corpus = "wikitext-2",
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
) -> None:
    """Write a corpus as a task for lm_eval, which then scores any model on it."""
    from crt_lib.hf.lmtask import write_task

    name = write_task(out, corpus, split)
    typer.echo(
        "lm_eval --model hf --model_args "
        "'pretrained=<folder>,trust_remote_code=True,max_length=<length of training>' "
        f"--include_path {shlex.quote(str(out))} --tasks {name} --device cpu --batch_size 8"
    )


@app.command()
def gate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint file.")],
    tokens: Annotated[int, typer.Option(help="Of the training text.", min=1)] = 50_000,
) -> None:
    """Fit an exit gate beside a checkpoint, for the criterion gate; the model stays as it is."""
    from crt_lib.exits.gate import GATE_FILE
    from crt_lib.runs.run import find_checkpoint, gate_run

    gate_run(checkpoint, tokens)
    typer.echo(f"gate: {find_checkpoint(checkpoint).with_name(GATE_FILE)}")


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(help="A run's folder, a checkpoint, hf:<folder> or <module>:<name>."),
    ],
    length: Annotated[int, typer.Option(help="Tokens in the probe.", min=2)] = 24,
    vocab_size: Annotated[
        int | None, typer.Option(help="Where the model does not say it.", min=2)
    ] = None,
    only_causality: Annotated[
        bool, typer.Option("--only-causality", help="Neither parameters nor speed.")
    ] = False,
) -> None:
    """Does a model see the tokens it is asked to predict? Exit code 1 if it does, 2 for an error.

    Any causal language model: ids (B, T) to logits (B, T, V). Also its parameters and speed.
    """
    from torch import nn

    from crt_lib.audit.checks import causality_report, parameter_report, speed_report
    from crt_lib.audit.probes import positions_of
    from crt_lib.hf.targets import load_target

    try:
        target = load_target(model, vocab_size)
    except OSError as error:
        raise InputError(str(error)) from error  # 1 is for leaks
    length = min(length, positions_of(target.model) or length)
    report = causality_report(target.model, target.vocab_size, length=length)
    typer.echo(str(report))
    if not only_causality:
        if isinstance(target.model, nn.Module):
            typer.echo(f"\n{parameter_report(target.model)}")
        try:
            typer.echo(f"\n{speed_report(target.model, target.vocab_size, seq_len=length)}")
        except Exception as error:  # anybody's model: the verdict stands
            typer.echo(f"\nspeed: not measured: {type(error).__name__}: {error}", err=True)
    raise typer.Exit(int(report.leaks))


@app.command()
def search(
    arms: Annotated[
        list[str],
        typer.Argument(help="Names or groups, as ladder, variants, baselines, paper-ablations."),
    ],
    out: Annotated[Path, typer.Option(help="CSV file; rows it has are not made again.")],
    rates: Annotated[list[float], typer.Option("--lr", help="Learning rate (repeatable).")],
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed (repeatable).")] = None,
    updates: Annotated[int | None, typer.Option(help="Equal tokens: updates of each.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Equal time: minutes of one processor for each.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each.", min=1)] = None,
    documents: Annotated[
        bool, typer.Option(help="Also score the documents of test, for intervals.")
    ] = False,
    tuned: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Halve or double each arm's rate with the first seed until its best has a worse "
            "one on either side; then train the other seeds at the best.",
        ),
    ] = False,
) -> None:
    """Train named configurations for equal tokens or equal time, and compare them on valid."""
    from crt_lib.study.ladder import choose_arms
    from crt_lib.study.search import grid, tune
    from crt_lib.study.search import search as run_search

    chosen, seeds = choose_arms(arms), seeds or [0]
    how = {"jobs": jobs, "threads": threads, "documents": documents, "echo": typer.echo}
    if tuned:
        tune(chosen, out, rates, seeds, updates=updates, minutes=minutes, **how)
    else:
        run_search(grid(chosen, rates, seeds, updates, minutes), out, **how)


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
def claims(
    results: Results = Path("results"),
) -> None:
    """Hold the paper's claims against the files under results/: claims.csv and claims.md there."""
    from crt_lib.study.claims import write_claims
    from crt_lib.study.ledger import summary

    rows = write_claims(results)
    for row in rows:
        values = " | ".join(row[name] for name in ("paper", "released", "honest"))
        typer.echo(f"{row['id']} {row['verdict']:<24} {row['claim']}: {values}")
    typer.echo(summary(rows))


@app.command()
def report(
    folder: Annotated[Path, typer.Option(help="Where the pages are.", exists=True)] = Path("."),
    results: Results = Path("results"),
    times: Annotated[
        Path | None,
        typer.Option(help="First take the notebooks' times from this run of `crt reproduce`."),
    ] = None,
) -> None:
    """Rewrite the tables of the pages from the files under results/."""
    from crt_lib.show.pages import PAGES, record_times, update_page

    if times is not None:
        record_times(times, results)
    for name, blocks in PAGES.items():
        changed = update_page(folder / name, results, blocks)
        typer.echo(f"{folder / name}: {'updated' if changed else 'up to date'}")


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
    how = {"only": only or (), "parameters": given, "fresh": fresh, "notebooks_dir": notebooks}
    if jobs == 1:
        from crt_lib.book.pipeline import reproduce as run_notebooks

        run_notebooks(profile, out=out, **how)
    else:
        from crt_lib.book.batch import reproduce_parallel

        reproduce_parallel(profile, jobs, out=out, **how)


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
    jobs: Annotated[int, typer.Option(help="Points at a time, on this machine.", min=1)] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler that runs them instead.")
    ] = None,
) -> None:
    """Run notebooks over a grid of parameters; go on where an interrupted sweep stopped."""
    values: dict[str, list[str]] = {}
    for name, text in map(key_value, grid):
        values[name] = values.get(name, []) + [value.strip() for value in text.split(",")]

    from crt_lib.book.batch import sweep as run_sweep

    how = {"profile": profile, "notebooks_dir": folder, "jobs": jobs, "scheduler": scheduler}
    rows = run_sweep(notebooks, values, out, **how)
    typer.echo(f"{len(rows)} rows of results: {out / 'sweep.csv'}" if rows else f"done: {out}")


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
