"""The commands of `crt bench`."""

from pathlib import Path
from typing import Annotated

import typer

from crt_lib.config import ModelConfig
from crt_lib.options import PLAIN_HELP, ProfileName, Recipe, key_value, parse_value, short
from crt_lib.profiles import load_profile

bench_app = typer.Typer(
    help="Measure speed and memory on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=PLAIN_HELP,
)


@bench_app.command("train")
def bench_train(
    batch_size: Annotated[int, typer.Option(help="Rows a step.", min=1)] = 2,
    seq_len: Annotated[int, typer.Option(help="Positions a row.", min=2)] = 384,
    steps: Annotated[int, typer.Option(help="Measured steps of each side.", min=1)] = 3,
    corpus: Annotated[str, typer.Option(help="Where the lines come from.")] = "wikitext-2",
    tokenizer: Annotated[str, typer.Option(help="gpt2, bpe:<vocabulary> or word.")] = "gpt2",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting, for instance n_loops=4.", metavar="K=V"),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of our side: auto, fp32, bf16.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="CSV file, and <file>_parts.csv; rows of other shapes, precisions and machines "
            "are kept."
        ),
    ] = None,
) -> None:
    """A training step as released against ours: tokens/s, memory, MFU, and the time by part."""
    settings = dict(key_value(text) for text in changes or [])
    config = ModelConfig().replace(**{name: parse_value(text) for name, text in settings.items()})

    from crt_lib.bench import bench_training, keep_others, print_bench
    from crt_lib.runs import read_rows, write_rows

    rows, parts = bench_training(config, corpus, tokenizer, batch_size, seq_len, steps, precision)
    print_bench(rows, parts)
    if out is not None:
        for path, new in ((out, rows), (out.with_name(f"{out.stem}_parts.csv"), parts)):
            write_rows(path, keep_others(read_rows(path) if path.exists() else [], new))


@bench_app.command("decode")
def bench_decode_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint file.")],
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", help="Texts at a time (repeatable).", min=1)
    ] = None,
    new_tokens: Annotated[int, typer.Option("--tokens", help="New tokens.", min=1)] = 256,
    texts: Annotated[int, typer.Option(help="Texts a batch size, at least.", min=1)] = 4,
    repeats: Annotated[int, typer.Option(help="Measured rounds.", min=1)] = 9,
    uncached: Annotated[bool, typer.Option(help="Also without a cache (slow).")] = True,
    bf16: Annotated[bool, typer.Option(help="Weights and states in bfloat16.")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file.")] = None,
) -> None:
    """Decoding without a cache, with it, with exits, speculated, and by a GPT-2 of the size."""
    import torch

    from crt_lib.analysis import checkpoint_digest, named_policies, taken_loss
    from crt_lib.benchdecode import bench_decode, first_prompts
    from crt_lib.runs import gate_run, load_trained, write_rows
    from crt_lib.trace import make_trace

    model, data, trained = load_trained(checkpoint)
    if model.gate is None:
        model = gate_run(checkpoint)
    model = model.to(torch.bfloat16 if bf16 else torch.float32)
    seq_len = trained["train"]["seq_len"]
    valid, test = (
        make_trace(model, data, name, seq_len, max_tokens=50_000) for name in ("valid", "test")
    )
    policies = named_policies(model, data, valid)
    losses = {name: taken_loss(model, data, test, policy) for name, policy in policies.items()}
    how = {"new_tokens": new_tokens, "repeats": repeats, "uncached": uncached}
    rows = []
    for batch_size in batch_sizes or [1]:
        prompts = first_prompts(data, seq_len, -(-texts // batch_size) * batch_size)
        rows += bench_decode(model, prompts, policies, losses, test, batch_size=batch_size, **how)
    digest = checkpoint_digest(checkpoint)
    rows = [{**row, "checkpoint": digest} for row in rows]
    for row in rows:
        typer.echo("  ".join(f"{key} {short(row[key])}" for key in row))
    if out is not None:
        write_rows(out, rows)


@bench_app.command("step")
def bench_step_command(
    profile: ProfileName = "small",
    recipe: Recipe = None,
    steps: Annotated[int, typer.Option(help="Measured steps of each path.", min=1)] = 7,
    out: Annotated[
        Path | None, typer.Option(help="Folder for step.csv and step_costs.csv.")
    ] = None,
) -> None:
    """What the fast paths of a training step save, and the five operations that cost most."""
    chosen = load_profile(profile, recipe)

    from crt_lib.benchstep import bench_step, step_costs
    from crt_lib.runs import write_rows

    tables = {"step.csv": bench_step(chosen, steps), "step_costs.csv": step_costs(chosen)}
    for name, rows in tables.items():
        for row in rows:
            typer.echo("  ".join(f"{key} {short(row[key])}" for key in row))
        if out is not None:
            write_rows(out / name, rows)
