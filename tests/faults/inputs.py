"""Bad values for every parameter of every command, made from the commands' own signatures."""

import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kills
from damage import Base
from harness import Case, Child, Kind, Lost, command, contents, one_line

SECONDS = 60  # in which a bad value must be refused
STRANGE = "ünï☃ '\"$(x)"
HUGE, ENDLESS = "9" * 30, "1e999"
WRONG: dict[
    type, tuple[str, ...]
] = {  # of a type: what never is one, and what no parameter of ours allows
    int: ("", "x", "nan", "1.5", "-1", HUGE),
    float: ("", "x", "nan", "-1", ENDLESS),
    str: ("", STRANGE, "../../x", "x" * 5000),
    Path: ("missing", "a file", STRANGE),
}
# Values that are right for a parameter after all.
RIGHT = {
    ("generate", "top_k", HUGE),
    ("generate", "temperature", ENDLESS),
    ("calibrate", "budget", ENDLESS),
    ("audit", "seconds", ENDLESS),
    ("audit", "length", HUGE),  # no more than the model has positions for
    ("gate", "tokens", HUGE),  # no more than the text has
    ("search", "updates", HUGE),  # which is what is then done
}
# Texts in which anything may stand: what is to be continued, and what names are compared with.
FREE = {("generate", "prompts"), ("bench decode", "only")}
WRITTEN = {"out", "html"}  # paths that are made where they are not


@dataclass(frozen=True)
class Parameter:
    """Of a command: its name, how it is given, its type, and whether it is a flag."""

    name: str
    option: str  # "" for an argument
    kind: type
    flag: bool


def commands() -> dict[str, list[Parameter]]:
    """The parameters of every command, by its name."""
    from crt_lib.cli import app

    found = {}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        prefix = f"{group.name} " if isinstance(group.name, str) else ""
        for one in group.typer_instance.registered_commands:
            assert one.callback is not None
            name = one.name or one.callback.__name__.replace("_", "-")
            found[prefix + name] = _parameters(one.callback)
    return found


def _parameters(callback: Any) -> list[Parameter]:
    hints = typing.get_type_hints(callback, include_extras=True)
    found = []
    for name in inspect.signature(callback).parameters:
        kind, info = typing.get_args(hints[name])
        parts = typing.get_args(kind) or (kind,)  # X | None, list[X] | None, list[X]
        (plain,) = {p for part in parts for p in (typing.get_args(part) or (part,))} - {type(None)}
        declared = [d for d in info.param_decls or () if d.startswith("--")]
        option = (declared or [f"--{name.replace('_', '-')}"])[0]
        argument = type(info).__name__ == "ArgumentInfo"
        found.append(Parameter(name, "" if argument else option, plain, plain is bool))
    return found


def base_words(name: str, base: Base, folder: Path) -> dict[str, list[str]]:
    """Right words of a command, by parameter: enough for it to run, and none of its time."""
    run, out = str(base.rich), str(folder / "out")
    smoke = {"profile": ["--profile", "smoke"], "out": ["--out", out]}
    right: dict[str, dict[str, list[str]]] = {
        "train": {**smoke, "quiet": ["--quiet"]},
        "generate": {"checkpoint": [run], "prompts": ["the"]},
        "explore": {"run": [run], "out": ["--html", out]},
        "export": {"checkpoint": [run], "out": [out]},
        "lm-task": {"out": [out]},
        "average": {"run": [run]},
        "audit": {"model": [run]},
        "search": {"arms": ["crt2"], "rates": ["--lr", "1e-3"], "out": ["--out", out]},
        "arena": {"name": ["few"], "folder": ["--out", str(folder)]},
        "gpu": {"out": ["--out", out]},
        "reproduce": {**smoke, "only": ["--only", "01"]},
        "sweep": {"notebooks": ["01"], "grid": ["--grid", "seed=0"], **smoke},
    }
    if name in right:
        return right[name]
    return {"checkpoint": [run]} if name not in ("claims", "report", "results", "doctor") else {}


def kinds(base: Base) -> Iterator[Kind]:
    """The kinds of this module."""
    holds = "one clear line on stderr, exit status 2, no traceback, no file left"
    yield Kind("bad input, generated", holds, cases(base))


def cases(base: Base) -> Iterator[Case]:
    """A case a parameter and wrong value."""
    for name, parameters in commands().items():
        for parameter in parameters:
            if parameter.flag or (name, parameter.name) in FREE:
                continue
            written = parameter.name in WRITTEN
            if written and name.startswith("bench"):
                continue  # which measures for minutes, and then writes
            for value in ("a file",) if written else WRONG[parameter.kind]:
                if (name, parameter.name, value) not in RIGHT:
                    case = partial(refused, base, name, parameter, value)
                    said = value if len(value) < 30 else f"{value[:5]}... ({len(value)})"
                    yield Case(f"{name} {parameter.option or parameter.name} {said!r}", case)


def refused(base: Base, name: str, parameter: Parameter, value: str, folder: Path) -> None:
    """The command refuses the value, and leaves nothing."""
    if value == "a file":
        (folder / "file").write_text("x")
        value = str(folder / "file" / "x")
    elif value == "missing":
        value = str(folder / "nowhere" / "x")
    given = base_words(name, base, folder) | {
        parameter.name: [parameter.option, value] if parameter.option else [value]
    }
    if parameter.name == "port":
        del given["out"]  # with which nothing is served
    words = [*name.split(), *(w for of in given.values() for w in of)]
    before = contents(folder)
    child = Child(command(*words, patch=partial(kills.at, folder)), folder)
    one_line(child.wait(SECONDS), 2)
    left = contents(folder).keys() - before.keys()
    if left:
        raise Lost(f"it left {', '.join(sorted(left)[:3])}")
