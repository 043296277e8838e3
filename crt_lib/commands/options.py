"""What the commands of `crt` share: their common options, and settings given as text."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crt_lib.files import InputError
from crt_lib.runs.profiles import Profile

# With a value for `--help` where it is not given, typer converts nothing and imports no pydantic.
PLAIN_HELP = {"default_map": {"help": False}, "max_content_width": 100}

ProfileName = Annotated[str, typer.Option(help="smoke, quick, small or paper.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="released, paper, crt2 or gpt2; by default crt2 (paper for the profile paper)."
    ),
]
CORPUS = typer.Option(help="A corpus name, or a folder with train.txt, valid.txt and test.txt.")
Corpus = Annotated[str | None, CORPUS]
Tokenizer = Annotated[str | None, typer.Option(help="gpt2, bpe:<vocabulary> or word.")]
Notebooks = Annotated[
    Path | None, typer.Option("--notebooks", help="Folder of the notebooks; default notebooks/.")
]
Results = Annotated[Path, typer.Option(help="Where the results are.", exists=True)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, for instance model.d_model=128.", metavar="K=V"),
]


def change_profile(
    profile: Profile, corpus: str | None, tokenizer: str | None, changes: list[str]
) -> Profile:
    """`profile` with another corpus or tokenizer, and settings given as model.x=v or train.x=v."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for text in changes:
        key, value = key_value(text)
        part, _, field = key.partition(".")
        if part not in parts or not field:
            raise InputError(f"--set {text}: write model.<field>=<value> or train.<field>=<value>")
        parts[part][field] = parse_value(value)
    return profile.replace(
        corpus=corpus or profile.corpus,
        tokenizer=tokenizer or profile.tokenizer,
        model=profile.model.replace(**parts["model"]),
        train=profile.train.replace(**parts["train"]),
    )


def key_value(text: str) -> tuple[str, str]:
    """NAME=VALUE in two; raises InputError for anything else."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InputError(f"{text!r} is not NAME=VALUE")
    return key, value


def parse_value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def short(value: Any) -> str:
    """A value of a table, in five digits where it is a measurement."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
