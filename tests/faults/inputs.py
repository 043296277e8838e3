"""Bad values for every parameter of every command, made from the commands' own signatures."""

import inspect
import math
import os
import signal
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kills
from base import Base
from harness import Case, Child, Kind, Lost, command, contents, one_line
from limits import address_space

EXAMPLES = 60  # of bad values, for each public function
MEMORY = 2 << 30  # bytes of address space, beyond what the imports take
SECONDS = 60  # in which a bad value must be refused
STRANGE = "ünï☃ '\"$(x)"
NO_UTF8 = "\udcff\udcfe"  # how Python has bytes of an argument that are not UTF-8
HUGE, ENDLESS = "9" * 30, "1e999"
WRONG: dict[
    type, tuple[str, ...]
] = {  # of a type: what never is one, and what no parameter of ours allows
    int: ("", "x", "nan", "1.5", "-1", HUGE),
    float: ("", "x", "nan", "-1", ENDLESS),
    str: ("", STRANGE, "../../x", "x" * 5000, NO_UTF8),
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
    ("foresight", "tokens", HUGE),
    ("search", "updates", HUGE),  # which is what is then done
}
# Texts in which anything in UTF-8 may stand: to be continued, and what names are compared with.
FREE = {("generate", "prompts"), ("generate", "never"), ("bench decode", "only")}
# Objects and functions that the core is given right: what is none of them fails as Python does.
GIVEN_RIGHT = {
    *(("evaluate", "model"), ("evaluate", "split"), ("generate", "each"), ("train", "begin")),
    *(("train", name) for name in ("model_config", "train_config", "data", "on_start", "losses")),
}
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
    holds = "InputError or OSError with one clear line, or it is taken; "
    holds += f"in {SECONDS} s and {MEMORY >> 30} GB"
    yield Kind("bad input, public functions", holds, public(base))


def cases(base: Base) -> Iterator[Case]:
    """A case a parameter and wrong value."""
    for name, parameters in commands().items():
        for parameter in parameters:
            if parameter.flag:
                continue
            free = (name, parameter.name) in FREE
            written = parameter.name in WRITTEN
            if written and name.startswith("bench"):
                continue  # which measures for minutes, and then writes
            wrong = (NO_UTF8,) if free else WRONG[parameter.kind]
            for value in ("a file",) if written else wrong:
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


def public(base: Base) -> Iterator[Case]:
    """A case a public function or class: wrong values, one at a time, by the types it declares."""
    import crt_lib

    for name in crt_lib.__all__:
        # CRT has no other argument than its settings, and audit is causality_report
        if name not in ("InputError", "CRT", "audit"):
            yield Case(name, partial(_fuzzed, base, name), faults=EXAMPLES)


def right_arguments(base: Base, folder: Path) -> dict[str, dict[str, Any]]:
    """Right arguments of each public function, of little work."""
    from crt_lib import load, load_corpus, load_profile, tokenize

    model, tokenizer = load(base.run)
    corpus, profile = load_corpus(str(base.corpus)), load_profile("smoke")
    data = tokenize(corpus, tokenizer)
    shape = profile.model.replace(vocab_size=tokenizer.vocab_size)
    short = profile.train.replace(updates=1, eval_every=0, seq_len=16, eval_tokens=32)
    return {
        "ModelConfig": asdict(shape),
        "Profile": dict(vars(profile)),
        "TrainConfig": asdict(short),
        "causality_report": {"model": model, "vocab_size": None, "seconds": 0.0, "context": 30},
        "evaluate": {"model": model, "split": data.test, "eot_id": 0, "max_tokens": 64},
        "generate": {"model": model, "prompts": [[1, 2]], "new_tokens": 2},
        "load": {"path": base.run},
        "load_corpus": {"name": str(base.corpus)},
        "load_profile": {"name": "smoke"},
        "load_tokenizer": {"name": "word", "corpus": corpus},
        "tokenize": {"corpus": corpus, "tokenizer": tokenizer},
        "train": {"model_config": shape, "train_config": short, "data": data, "progress": False}
        | {"out": folder / "trained"},
    }


def _wrong_values(kind: str) -> Any:
    """Values for a parameter whose annotation says `kind`: of another type, or out of any range."""
    from hypothesis import strategies as st

    others = st.sampled_from([None, 5, -3, 2.5, math.nan, "x", "", b"x", [], {}, [None], object()])
    wrong = [others]
    if "int" in kind:
        edges = st.sampled_from([-1, 0, -(10**12), 10**12, 1 << 63, 1 << 64, 10**30])
        wrong += [edges, st.integers(max_value=0)]
    if "float" in kind:
        wrong += [st.sampled_from([math.inf, -math.inf, -1.0, 1e308]), st.floats(max_value=0)]
    if "str" in kind or "Path" in kind:
        wrong += [
            st.sampled_from(["../../x", "x" * 5000, NO_UTF8, "\0"]),
            st.text(max_size=9).filter(lambda text: "/" not in text),
        ]
    if "Sequence" in kind or "tuple" in kind:
        wrong += [st.lists(st.sampled_from([-1, 2.5, None, "x", 1 << 64, []]), max_size=2)]
        wrong += [st.lists(st.lists(st.sampled_from([-1, 2.5, None, "x", 1 << 64]), max_size=2))]
    return st.one_of(wrong)


def _fuzzed(base: Base, name: str, folder: Path) -> None:
    """EXAMPLES of bad values, in a process with little memory."""
    memory = address_space() + MEMORY
    done = Child(partial(_fuzz, base, name, folder), folder, memory).wait(10 * SECONDS)
    said = done.err.strip().splitlines()
    told = [line for line in said if line.startswith(("AssertionError", "E: "))]
    assert done.status == 0, f"{told[-1:] or said[-1:]}"


def _fuzz(base: Base, name: str, folder: Path) -> None:
    from hypothesis import HealthCheck, given, settings, strategies as st

    import crt_lib

    below = folder / "a" / "b"  # where names that climb, or none, lead to
    below.mkdir(parents=True)
    os.chdir(below)
    called = getattr(crt_lib, name)
    declared = inspect.signature(called).parameters.items()
    kinds = {of: str(one.annotation) for of, one in declared if (name, of) not in GIVEN_RIGHT}
    right = right_arguments(base, folder)[name]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
        report_multiple_bugs=False,
    )
    @given(st.data())
    def tried(data: Any) -> None:
        which = data.draw(st.sampled_from([*kinds]))
        given_ = right | {which: data.draw(_wrong_values(kinds[which]))}
        signal.alarm(SECONDS)
        begun = f"{name}({which}={given_[which]!r:.60})"
        try:
            called(**given_)
        except (crt_lib.InputError, OSError) as error:  # OSError: a name too long, for instance
            assert len(str(error)) > 15, f"{begun}: the line says little: {error}"
            assert "\n" not in str(error), f"{begun}: more than a line: {error}"
        except Exception as error:
            raise AssertionError(f"{begun}: {type(error).__name__}: {error}") from None
        finally:
            signal.alarm(0)

    tried()
