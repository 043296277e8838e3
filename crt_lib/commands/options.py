"""What the commands of `crt` share: their common options, and settings given as text."""

import contextlib
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from crt_lib.files import InputError, write_rows
from crt_lib.runs.profiles import Profile

# With a value for `--help` where it is not given, typer converts nothing and imports no pydantic.
PLAIN_HELP = {"default_map": {"help": False}, "max_content_width": 100}

Checkpoint = Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint file.")]
ProfileName = Annotated[str, typer.Option(help="smoke, quick, small or paper.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="released, paper, crt2 or gpt2; by default crt2 (paper for the profile paper)."
    ),
]
CORPUS = typer.Option(help="A corpus name, or a folder with train.txt, valid.txt and test.txt.")
Corpus = Annotated[str | None, CORPUS]
TOKENIZER = typer.Option(help="gpt2, bpe:<vocabulary> or word.")
Tokenizer = Annotated[str | None, TOKENIZER]
Split = Annotated[str, typer.Option(help="train, valid or test.")]
Notebooks = Annotated[
    Path | None, typer.Option("--notebooks", help="Folder of the notebooks; default notebooks/.")
]
Results = Annotated[Path, typer.Option(help="Where the results are.", exists=True)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, for instance train.updates=300.", metavar="K=V"),
]
AT_ONCE = 1024  # more than any machine here has use for
Jobs = Annotated[
    int, typer.Option(help="Trainings or notebooks at a time, here.", min=1, max=AT_ONCE)
]
Threads = Annotated[
    int | None, typer.Option(help="Threads of each; default: all, shared.", min=1, max=AT_ONCE)
]
BatchSizes = Annotated[
    list[int] | None,
    typer.Option("--batch-size", help="Texts at a time (repeatable); 1 and 8.", min=1),
]
Exit = Annotated[
    str | None,
    typer.Option("--exit", help="full, a loop, or a criterion; default: the fastest calibrated."),
]


def percent(text: str) -> float:
    """The number of `0.5` and of `0.5%`."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(str(text).removesuffix("%"))) < math.inf:
            return value
    raise typer.BadParameter(f"{text!r} is not a percentage from 0 on")


AUTO = -1  # of `draft_loop`


def draft_loop(text: str) -> int:
    """The loop that is named; 0 for text, AUTO for auto."""
    named = {"auto": AUTO, "text": 0}
    if text not in named and not (text.isdecimal() and 0 < int(text) < 2**31):
        raise typer.BadParameter(f"{text!r} is neither text, auto nor a loop")
    return named[text] if text in named else int(text)


PERCENT = typer.Option(help="Percent of the perplexity exits may lose.", parser=percent)
Speculate = Annotated[
    int | None,
    typer.Option(
        "--speculate",
        help="This loop's exit drafts, or the text so far; auto: the fastest calibrated. The text "
        "stays that of full depth, or with the text's drafts of --exit K.",
        parser=draft_loop,
        metavar="LOOP|text|auto",
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.", min=0, max=2**63 - 1)]
Table = Annotated[Path | None, typer.Option(help="CSV file for the rows.")]


def settings(texts: list[str] | None) -> dict[str, Any]:
    """Values by name of texts NAME=VALUE, parsed where they are JSON."""
    values: dict[str, Any] = {}
    for name, text in map(key_value, texts or []):
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def change_profile(
    profile: Profile, corpus: str | None, tokenizer: str | None, changes: dict[str, Any]
) -> Profile:
    """`profile` with another corpus or tokenizer, and settings named model.x or train.x."""
    own = {"corpus": corpus, "tokenizer": tokenizer}
    named = {name: value for name, value in own.items() if value is not None}
    parts = by_part(changes, "model", "train")
    changed = {part: getattr(profile, part).replace(**of) for part, of in parts.items()}
    return profile.replace(**named, **changed)


def by_part(changes: dict[str, Any], *parts: str) -> dict[str, dict[str, Any]]:
    """Settings named <part>.<field>, by part and field; raises InputError for other names."""
    found: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in changes.items():
        part, _, field = name.partition(".")
        if part not in found or not field:
            forms = " or ".join(f"{part}.<field>=<value>" for part in parts)
            raise InputError(f"--set {name}={value}: write {forms}")
        found[part][field] = value
    return found


def key_value(text: str) -> tuple[str, str]:
    """NAME=VALUE in two; raises InputError for anything else."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InputError(f"{text!r} is not NAME=VALUE")
    return key, value


def show_rows(rows: list[dict[str, Any]], out: Path | None, as_json: bool = False) -> None:
    """Print rows of a table, measurements in five digits, and write them to a CSV file `out`."""
    for row in rows:
        cells = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()}
        line = "  ".join(f"{name} {cell}" for name, cell in cells.items() if cell is not None)
        typer.echo(json.dumps(row) if as_json else line)
    if out is not None:
        write_rows(out, rows)
