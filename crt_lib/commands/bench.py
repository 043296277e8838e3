"""The commands of `crt bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crt_lib.commands import options
from crt_lib.config import ModelConfig
from crt_lib.files import InputError, sha256
from crt_lib.runs.profiles import load_profile

if TYPE_CHECKING:
    from crt_lib.study.analysis import Analysis
    from crt_lib.text.tokenizer import TokenizedCorpus

bench_app = typer.Typer(
    help="Measure speed and memory on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=options.PLAIN_HELP,
)


@bench_app.command("train")
def bench_train(
    batch_size: Annotated[int, typer.Option(help="Rows a step.", min=1)] = 2,
    seq_len: Annotated[int, typer.Option(help="Positions a row.", min=2)] = 384,
    steps: Annotated[int, typer.Option(help="Measured steps of each side.", min=1)] = 3,
    corpus: Annotated[str, options.CORPUS] = "wikitext-2",
    tokenizer: Annotated[str, options.TOKENIZER] = "gpt2",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting, for instance n_loops=4.", metavar="K=V"),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of our side: auto, fp32, bf16.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file, and <file>_parts.csv; rows of other measurements are kept."),
    ] = None,
) -> None:
    """A training step as released against ours: tokens/s, memory, MFU, and the time by part."""
    config = ModelConfig().replace(**options.settings(changes))

    from crt_lib.bench.table import put_rows
    from crt_lib.bench.training import CASE, bench_training
    from crt_lib.text.corpus import load_corpus
    from crt_lib.text.tokenizer import load_tokenizer, tokenize

    source = load_corpus(corpus)
    data = tokenize(source, load_tokenizer(tokenizer, source))
    rows, parts = bench_training(config, data, batch_size, seq_len, steps, precision)
    options.show_rows(rows + parts, None)
    for name in ("useful_tokens_per_second", "peak_memory_bytes"):
        typer.echo(f"{name}: {rows[1][name] / rows[0][name]:.2f}x")
    most = max(parts, key=lambda row: row["share_of_lost"])
    typer.echo(f"most is lost in {most['part']}: {most['share_of_lost']:.0%} of it")
    if out is not None:
        put_rows(out, rows, CASE)
        put_rows(out.with_name(f"{out.stem}_parts.csv"), parts, CASE)


@bench_app.command("decode")
def bench_decode_command(
    checkpoint: options.Checkpoint,
    batch_sizes: options.BatchSizes = None,
    new_tokens: Annotated[int, typer.Option("--tokens", help="New tokens.", min=3)] = 128,
    texts: Annotated[int, typer.Option(help="Passages of test.", min=1, max=9999)] = 64,
    only: Annotated[list[str] | None, typer.Option(help="Ways with this in their name.")] = None,
    uncached: Annotated[bool, typer.Option(help="Also without a cache (slow).")] = True,
    bf16: Annotated[bool, typer.Option(help="Weights and states in bfloat16.")] = False,
    out: options.Table = None,
) -> None:
    """Decoding with exits, speculated, in 8 bits, without a cache, and by GPT-2s beside it."""
    sizes, found = batch_sizes or [1, 8], []
    if uneven := [rows for rows in sizes if texts % rows]:
        raise InputError(f"{texts} texts are not whole batches of {uneven[0]}; ask for others")

    import torch

    from crt_lib.runs.trained import load_trained

    judged, _ = _analysed(checkpoint)
    prompts = _passages(
        load_trained(checkpoint)[1], judged.model.config.max_seq_len, texts, new_tokens
    )
    judged.model.to(torch.bfloat16 if bf16 else torch.float32)
    how: dict[str, Any] = {"new_tokens": new_tokens, "uncached": uncached, "only": only or ()}
    for rows in sizes:
        found += judged.bench(prompts, rows, **how)
    options.show_rows(found, out)


@bench_app.command("exits")
def bench_exits_command(
    checkpoint: options.Checkpoint,
    batch_sizes: options.BatchSizes = None,
    groups: Annotated[int, typer.Option(help="Batches of windows that are read.", min=2)] = 10,
    seq_len: Annotated[int, typer.Option("--tokens", help="Of a window.", min=2)] = 256,
    threads: options.Threads = None,
    out: options.Table = None,
) -> None:
    """Exit policies timed on the text that they are scored on, against the best fixed exit."""
    from crt_lib.bench.exits import bench_exits
    from crt_lib.runs.trained import load_trained

    judged, policies = _analysed(checkpoint, threads)
    (_, data, _), found = load_trained(checkpoint), []
    length = min(seq_len, judged.model.config.max_seq_len)
    text = data.test.ids, data.tokenizer.eot_id
    for rows in batch_sizes or [1, 8]:
        how: dict[str, Any] = {"seq_len": length, "rows": rows, "groups": groups}
        found += bench_exits(judged.model, *text, policies, **how)
    options.show_rows([{**row, "checkpoint": judged.checkpoint} for row in found], out)


@bench_app.command("slots")
def bench_slots_command(
    checkpoint: options.Checkpoint,
    batch_sizes: options.BatchSizes = None,
    threads: options.Threads = None,
    out: options.Table = None,
) -> None:
    """What rows at different loops in one batch could save: measured costs, simulated ticks."""
    from crt_lib.bench.slots import bench_slots

    (judged, policies), found = _analysed(checkpoint, threads), []
    for rows in batch_sizes or [8, 32]:
        found += bench_slots(judged.model, judged.test, policies, rows)
    options.show_rows([{**row, "checkpoint": judged.checkpoint} for row in found], out)


def _analysed(checkpoint: Path, threads: int | None = None) -> tuple["Analysis", dict[str, Any]]:
    """The analysis of a run and its policies, on so many threads from now on."""
    import torch

    from crt_lib.study.analysis import analyse
    from crt_lib.study.policies import policies_of

    torch.set_num_threads(threads or torch.get_num_threads())
    judged = analyse(checkpoint)
    return judged, policies_of(judged.policies)


@bench_app.command("drafts")
def bench_drafts_command(
    checkpoint: options.Checkpoint,
    texts: Annotated[int, typer.Option(help="Passages of test.", min=2, max=9999)] = 64,
    new_tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each.")] = 128,
    threads: options.Threads = None,
    out: options.Table = None,
) -> None:
    """Speculation, one text at a time: drafts kept by position, their cost, and the bound."""
    import torch

    from crt_lib.bench.drafts import bench_drafts
    from crt_lib.runs.trained import as_crt, find_checkpoint, load_trained

    torch.set_num_threads(threads or torch.get_num_threads())
    loaded, data, _ = load_trained(checkpoint)
    model = as_crt(loaded, checkpoint)
    prompts = _passages(data, model.config.max_seq_len, texts, new_tokens)
    rows = bench_drafts(model, prompts, new_tokens)
    mark = {"checkpoint": "s" + sha256(find_checkpoint(checkpoint).read_bytes())}
    options.show_rows([row | mark for row in rows], out)


@bench_app.command("assisted")
def bench_assisted_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs' folders, or checkpoint files.")],
    assistant: Annotated[Path | None, typer.Option(help="Run of a smaller model.")] = None,
    texts: Annotated[int, typer.Option(help="Passages of test.", min=2, max=9999)] = 64,
    new_tokens: Annotated[int, typer.Option("--tokens", help="New tokens.", min=2)] = 128,
    threads: options.Threads = None,
    out: options.Table = None,
) -> None:
    """Trained models in transformers' generate: alone, with drafts by text, model or exit."""
    import torch

    from crt_lib.bench.assisted import bench_assisted
    from crt_lib.runs.trained import find_checkpoint, load_trained, load_trained_model

    torch.set_num_threads(threads or torch.get_num_threads())
    loaded = {run: load_trained_model(run) for run in (*runs, *([assistant] if assistant else []))}
    for run, (_, tokenizer, _) in loaded.items():
        if tokenizer.fingerprint != loaded[runs[0]][1].fingerprint:
            raise InputError(f"the tokens of {run} are not those of {runs[0]}")
    marks = {run: "s" + sha256(find_checkpoint(run).read_bytes()) for run in loaded}
    longest, found = min(model.config.max_seq_len for model, *_ in loaded.values()), []
    for run in runs:
        drafting = assistant if assistant and marks[assistant] != marks[run] else None
        smaller = loaded[drafting][0] if drafting else None
        prompts = _passages(load_trained(run)[1], longest, texts, new_tokens)
        rows = bench_assisted(loaded[run][0], prompts, new_tokens, smaller)
        found += [{"run": str(run)} | row | {"checkpoint": marks[run]} for row in rows]
    options.show_rows(found, out)


def _passages(
    data: "TokenizedCorpus", positions: int, count: int, new_tokens: int
) -> list[list[int]]:
    """`count` prompts from test that `new_tokens` more can follow in so many positions."""
    from crt_lib.bench.ways import PROMPT_TOKENS, passages

    if new_tokens >= positions:
        raise InputError(f"{new_tokens} new tokens: with a prompt, at most {positions - 1} fit")
    return passages(data.test.ids, count, min(PROMPT_TOKENS, positions - new_tokens))


@bench_app.command("quantize")
def bench_quantize_command(
    checkpoint: options.Checkpoint,
    batch_sizes: options.BatchSizes = None,
    max_tokens: Annotated[int, typer.Option("--tokens", help="Of test.", min=2)] = 16_384,
    out: options.Table = None,
) -> None:
    """What 8-bit weights lose, by exit, against float32, and the memory they take."""
    from crt_lib.bench.quantize import bench_quantize
    from crt_lib.runs.trained import as_crt, load_trained

    loaded, data, trained = load_trained(checkpoint)
    model, length, found = as_crt(loaded, checkpoint), trained["train"]["seq_len"], []
    for rows in batch_sizes or [1, 8]:
        found += bench_quantize(model, data, length, rows=rows, max_tokens=max_tokens)
    options.show_rows(found, out)


@bench_app.command("step")
def bench_step_command(
    profile: options.ProfileName = "small",
    recipe: options.Recipe = None,
    steps: Annotated[int, typer.Option(help="Measured steps of each path.", min=1)] = 7,
    sizes: Annotated[list[str] | None, typer.Option("--size", help="Profile (repeatable).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the three tables.")] = None,
) -> None:
    """The optimiser's share of an update, what the fast paths save, and what costs most.

    On random ids; sizes: quick, small and paper (Table 1's), where an update's micro-batches are
    counted from one.
    """
    chosen = load_profile(profile, recipe)

    from crt_lib.bench.step import bench_step, bench_updates, step_costs

    updates = bench_updates(sizes or ["quick", "small", "paper"])
    options.show_rows(updates, out and out / "step_updates.csv")
    options.show_rows(bench_step(chosen, steps), out and out / "step.csv")
    options.show_rows(step_costs(chosen), out and out / "step_costs.csv")


@bench_app.command("cost")
def bench_cost_command(
    seconds: Annotated[float, typer.Option(help="Of updates, for each row.")] = 2.5,
    out: Annotated[Path | None, typer.Option(help="Folder for cost.csv.")] = None,
) -> None:
    """Cost against size: tokens/s and peak memory by batch, length, loops, width and threads."""
    from crt_lib.bench.step import bench_cost

    options.show_rows(bench_cost(seconds), out and out / "cost.csv")
