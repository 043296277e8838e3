"""Commands on a trained model: `crt generate`, `explore`, `export`, `gate`, `audit` and more."""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crt_lib.commands import options
from crt_lib.files import InputError

if TYPE_CHECKING:
    from crt_lib.audit.checks import Check
    from crt_lib.exits.choice import Choice
    from crt_lib.exits.decode import Generated
    from crt_lib.study.analysis import Analysis
    from crt_lib.text.tokenizer import Tokenizer

app = typer.Typer()
UNK = "<unk>"  # WikiText's mark for a word that it has left out


@app.command()
def generate(
    checkpoint: options.Checkpoint,
    prompts: Annotated[list[str], typer.Argument(help="One or more texts to continue.")],
    new_tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each.", min=0)] = 64,
    exit_name: options.Exit = None,
    budget: Annotated[float | None, options.PERCENT] = None,
    tau0: Annotated[float | None, typer.Option(help="Threshold at the first loop (eq. 6).")] = None,
    tau_min: Annotated[float | None, typer.Option(help="The lowest threshold.")] = None,
    decay: Annotated[float | None, typer.Option(help="Of the threshold, by loop.")] = None,
    speculate: options.Speculate = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most probable.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw within this much probability.")] = 1.0,
    seed: options.Seed = 0,
    quantize: Annotated[str | None, typer.Option(help="int8: large weights in 8 bits.")] = None,
    never: Annotated[
        str | None, typer.Option(help=f"A text that is not written; default {UNK}, empty: none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
) -> None:
    """Continue texts, the fastest way that `crt calibrate` found, or with the exits asked for."""
    from crt_lib.exits.decode import Sampling, generate as run
    from crt_lib.exits.speculate import Speculation
    from crt_lib.runs.trained import as_crt, load_trained_model

    given = {"tau0": tau0, "tau_min": tau_min, "decay": decay}
    own = {name: value for name, value in given.items() if value is not None}
    if speculate is not None and (quantize or own):
        raise InputError(
            "--speculate keeps the text of every loop, or of a fixed exit, in float32; leave out "
            "thresholds and --quantize"
        )
    loaded, tokenizer, _ = load_trained_model(checkpoint)
    model, never_begins = as_crt(loaded, checkpoint), _beginning(tokenizer, never)
    how: Any = {"sampling": Sampling(temperature, top_k, top_p, never_begins), "seed": seed}
    # speculation was timed on one greedy text
    drafted = quantize is None and temperature == 0 and len(prompts) == 1
    choice = _way_to_decode(checkpoint, exit_name, budget, own, speculate, drafted)
    ids = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    made: Sequence[Generated]
    if choice.draft_loop is not None:
        draft = Speculation(model, choice.draft_loop, choice.policy.fixed)
        made = [draft.generate(i, new_tokens, **how) for i in ids]
    else:
        made = run(model, ids, new_tokens, policy=choice.policy, quantize=quantize, **how)
    for prompt, one in zip(prompts, made, strict=True):
        _print(prompt, tokenizer.decode(one.tokens), one.loops, as_json)


def _print(prompt: str, text: str, loops: list[int], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "text": text, "loops": loops}))
    else:
        mean = sum(loops) / max(len(loops), 1)
        typer.echo(f"{prompt}{text}\n[{len(loops)} tokens, {mean:.2f} loops each]")


def _beginning(tokenizer: "Tokenizer", text: str | None) -> tuple[int, ...]:
    """The tokens that `text` begins with, alone and after a space; None: UNK, if it is known."""
    given = UNK if text is None else text
    try:
        return tuple({int(tokenizer.encode(form)[0]) for form in (given, f" {given}") if given})
    except InputError:
        if text is None:
            return ()
        raise


def _way_to_decode(
    checkpoint: Path,
    exit_name: str | None,
    budget: float | None,
    thresholds: dict[str, Any],
    speculate: int | None,
    drafted: bool,
) -> "Choice":
    """What `crt generate` was asked for; says in one line what it takes by itself."""
    from crt_lib.exits.choice import FULL, Choice, choices_of, choose, drafts
    from crt_lib.exits.policy import Policy
    from crt_lib.runs.trained import find_checkpoint

    if thresholds:
        if exit_name is None:
            raise InputError("thresholds are of a criterion; name it with --exit")
        if budget is not None:
            raise InputError("thresholds of your own keep no budget; leave out one of the two")
        return Choice(Policy(exit_name, **thresholds))
    choices = choices_of(find_checkpoint(checkpoint))
    share = None if budget is None else budget / 100
    if speculate is not None:
        kept = choose(choices, exit_name or FULL, budget=share).policy
        if kept.criterion is not None:
            raise InputError(f"drafts are of every loop or a fixed exit, not of {exit_name}")
        loop = drafts(choices, kept.fixed) if speculate == options.AUTO else speculate
        return Choice(kept, draft_loop=loop)
    choice = choose(choices, exit_name, budget=share, drafted=drafted)
    if choices is not None and exit_name is None:
        typer.echo(f"[{choices.said(choice)}; --exit full runs every loop]", err=True)
    elif choices is not None and (failed := choices.failed.get(exit_name or "")):
        lost = math.expm1(failed.high)
        typer.echo(f"[exit {exit_name} may lose {lost:.2%} of the perplexity]", err=True)
    return choice


@app.command()
def explore(
    run: Annotated[Path, typer.Argument(help="A run's folder.", exists=True, file_okay=False)],
    out: Annotated[
        Path | None, typer.Option("--html", help="Write the page to this file, serve nothing.")
    ] = None,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; 0: any free one.", min=0)] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Explore exit policies of a run on one page: thresholds, what they lose and what they save.

    The page is served to this machine alone, until Ctrl-C. Traces that are not there are made.
    """
    from crt_lib.files import write_text
    from crt_lib.show.explorer_page import Explored, page_of
    from crt_lib.show.serving import serve
    from crt_lib.study.analysis import analyse

    page = page_of(Explored.of(analyse(run)))
    if out is None:
        serve(page, port, browser)
    else:
        write_text(out, page)
        typer.echo(f"page: {out}")


@app.command()
def export(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder for transformers, or a file .pt2 or .onnx.")],
    exit_loop: Annotated[int | None, typer.Option(help="Exit of a program.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, for the folder's card.")
    ] = None,
) -> None:
    """Write a model as a folder that transformers loads, or as a torch.export or ONNX program."""
    from crt_lib.hf.export import export_run

    typer.echo(f"exported: {export_run(checkpoint, out, exit_loop, license)}")


@app.command()
def lm_task(
    out: Annotated[Path, typer.Argument(help="Folder for the task; it will hold the text.")],
    corpus: Annotated[str, options.CORPUS] = "wikitext-2",
    split: options.Split = "test",
) -> None:
    """Write a corpus as a task for lm_eval, which then scores any model on it."""
    from crt_lib.hf.lm_task import write_task

    name = write_task(out, corpus, split)
    typer.echo(
        "lm_eval --model hf --model_args "
        "'pretrained=<folder>,trust_remote_code=True,max_length=<length of training>' "
        f"--include_path {shlex.quote(str(out))} --tasks {name} --device cpu --batch_size 8"
    )


@app.command()
def gate(
    checkpoint: options.Checkpoint,
    tokens: Annotated[int, typer.Option(help="Of the training text.", min=1)] = 50_000,
) -> None:
    """Fit an exit gate beside a checkpoint, for the criterion gate; the model stays as it is."""
    from crt_lib.exits.gate import GATE_FILE
    from crt_lib.runs.trained import find_checkpoint, gate_run

    gate_run(checkpoint, tokens)
    typer.echo(f"gate: {find_checkpoint(checkpoint).with_name(GATE_FILE)}")


@app.command()
def calibrate(
    checkpoint: options.Checkpoint,
    budget: Annotated[float, options.PERCENT] = 0.5,
    elsewhere: Annotated[
        str | None,
        typer.Option(help="Find nothing: hold what is kept to the test text of this corpus."),
    ] = None,
    out: options.Table = None,
) -> None:
    """Find the fastest ways to decode that lose at most a budget, and keep them.

    `crt generate` takes them. Thresholds come from half of valid; the other half tests them.
    """
    from crt_lib.exits.choice import CHOICES_FILE
    from crt_lib.files import sha256
    from crt_lib.runs.trained import find_checkpoint, load_trained
    from crt_lib.study.analysis import analyse
    from crt_lib.study.calibration import calibrate_exits

    judged, path = analyse(checkpoint), find_checkpoint(checkpoint)
    if elsewhere is not None:
        options.show_rows(_held_to(judged, checkpoint, elsewhere), out)
        return
    if out is not None:
        raise InputError("--out is for the rows of --elsewhere; what is found is kept in the run")
    data = load_trained(checkpoint)[1]
    choices = calibrate_exits(judged.model, data, judged.valid, judged.test, budget / 100)
    choices.save(path.with_name(CHOICES_FILE), sha256(path.read_bytes()))
    for name, way in {**choices.ways, **choices.failed}.items():
        speed = f"{way.speedup:.2f}x full depth" if name in choices.ways else "not kept"
        lost = f"{math.expm1(way.above):+.2%}, at most {math.expm1(way.high):+.2%}"
        paid = "" if way.paid is None else f", {math.expm1(way.paid):+.2%} on test"
        typer.echo(f"{name}: {speed}, perplexity {lost}{paid}")
    policy = choices.fastest(drafted=False)
    typer.echo(
        f"crt generate takes {choices.fastest()} for one greedy text, for others "
        + (f"exit {policy}" if policy.isdecimal() else policy)
    )


def _held_to(judged: "Analysis", checkpoint: Path, corpus: str) -> list[dict[str, Any]]:
    """What the policies that are kept lose on test of a corpus."""
    from crt_lib.exits.trace import make_trace
    from crt_lib.runs.trained import load_trained
    from crt_lib.study.calibration import hold_to

    if judged.choices is None:
        raise InputError(f"{checkpoint} keeps no promise; call crt calibrate without --elsewhere")
    data = load_trained(checkpoint, corpus)[1]
    length = len(judged.test.loss)
    trace = make_trace(judged.model, data, "test", judged.seq_len, max_tokens=length)
    return hold_to(judged.choices, judged.model, data, trace)


@app.command()
def foresight(
    checkpoint: options.Checkpoint,
    tokens: Annotated[
        int | None, typer.Option(help="Of valid and of test; all of them if not given.", min=2)
    ] = None,
) -> None:
    """How far rules that know more than a criterion would get, were they asked for nothing.

    Writes foresight.csv into the run's folder. Networks learn on valid what leaving would cost.
    """
    from crt_lib.files import sha256, write_rows
    from crt_lib.runs.trained import as_crt, find_checkpoint, load_trained
    from crt_lib.study.foresight import foresight as foresee

    path = find_checkpoint(checkpoint)
    model, data, record = load_trained(checkpoint)
    rows = foresee(as_crt(model, path), data, record["train"]["seq_len"], tokens=tokens)
    of = {"checkpoint": "s" + sha256(path.read_bytes())}
    write_rows(path.parent.parent / "foresight.csv", [row | of for row in rows])
    for row in rows:
        typer.echo(
            f"{row['who']}: as good as exit {row['fixed']} after {row['loops']:.2f} loops, "
            f"{row['knows']:.4f} nats better than chance at best"
        )


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a checkpoint, hf:<folder or id>, <module>:<name>, "
            "a .pt2 or an .onnx file; with --class, a file of weights."
        ),
    ],
    made_by: Annotated[
        str | None,
        typer.Option("--class", help="<module>:<name> that makes the model of a file of weights."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a short row.", min=2)] = 24,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a long one; else all that it declares.", min=2, max=2**24),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="If the model has none.", min=2)] = None,
    seconds: Annotated[
        float, typer.Option(help="For what grows with vocabulary and context.", min=0)
    ] = 10.0,
    only_causality: Annotated[
        bool, typer.Option("--only-causality", help="Neither parameters nor speed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="A page for the report.")] = None,
) -> None:
    """Does a model see the tokens it is asked to predict? Exit code 1: it leaks, 2: cannot tell.

    Any causal language model: ids (B, T) to logits (B, T, V). Also its parameters, the speed of its
    exits and, of a run on `grammar` or `lookup`, whether it scores below their entropy.
    """
    from crt_lib.audit import causality_report
    from crt_lib.audit.page import html_page
    from crt_lib.files import write_text
    from crt_lib.hf.targets import load_target

    with _anybodys_errors():
        target, size = load_target(model, vocab_size, made_by)
        report = causality_report(target, size, length=length, context=context, seconds=seconds)
        below = [] if made_by else _known_entropy(model)
    if html is not None:
        write_text(html, html_page(report, model, below))
    said = {"model": model, **report.to_dict(), "checks": [vars(check) for check in below]}
    typer.echo(json.dumps(said, indent=2) if as_json else "\n".join(map(str, [report, *below])))
    if not (as_json or only_causality):
        _costs(target, size, length)
    raise typer.Exit(report.status if all(check.passed for check in below) else 1)


def _known_entropy(model: str) -> "list[Check]":
    """Whether a run scores below the entropy of its language, where that is known; else nothing."""
    from crt_lib.audit.checks import KNOWN, entropy_check
    from crt_lib.checkpoint import read_state
    from crt_lib.runs.trained import find_checkpoint, load_trained_model

    if not Path(model).exists() or model.endswith((".pt2", ".onnx")):
        return []
    of = read_state(find_checkpoint(Path(model))).get("run", {}).get("data", {})
    if of.get("corpus") not in KNOWN or of.get("tokenizer") != "word":
        return []
    trained, tokenizer, _ = load_trained_model(Path(model))
    return entropy_check(trained, tokenizer, of["corpus"])


@contextlib.contextmanager
def _anybodys_errors() -> Iterator[None]:
    """Any error of somebody's model as an InputError, since exit code 1 is for leaks.

    What it prints goes to stderr: stdout has the report.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise InputError(f"{type(error).__name__}: {error}") from error


def _costs(target: Any, vocab_size: int, length: int) -> None:
    """A model's parameters, and the speed of its exits where it has some."""
    from torch import nn

    from crt_lib.audit import parameter_report, speed_report

    if isinstance(target, nn.Module):
        typer.echo(f"\n{parameter_report(target)}")
    config: Any = getattr(target, "config", None)
    if len(getattr(config, "head_loops", ())) > 1:
        length = min(length, config.max_seq_len)
        typer.echo(f"\n{speed_report(target, vocab_size, seq_len=length)}")
