"""Foes: files that run code, headers that lie, names that climb, HTML in names, other addresses."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import kills
import psutil
from base import Base
from harness import Case, Child, Kind, Lost, command, contents, crt, one_line

HOSTILE = "<script>x()<_script>\"&'<img src=x onerror=x()>"


class Runs:
    """What unpickling runs: it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def kinds(base: Base) -> Iterator[Kind]:
    """The kinds of this module."""
    yield Kind("code in a file of weights", "one line, exit status 2, nothing was run", code(base))
    yield Kind("safetensors header that lies", "one line, exit status 2", headers(base))
    yield Kind(
        "name that climbs, with code in it",
        "refused, or taken as the text that it is",
        climbs(base),
    )
    yield Kind("HTML in a name, a passage", "escaped on every page", html(base))
    yield Kind("server of `crt explore`", "bound to 127.0.0.1 alone; Ctrl-C ends it", server(base))


def program(data: bytes) -> Callable[[Path], None]:
    """A zip as torch.save and torch.export write it, whose pickle is `data`."""

    pickles = ("data.pkl", "serialized_exported_program.json", "models/model.json")
    parts = ("data/weights/model.pt", "data/constants/model.pt")
    texts = {"version": "3", "byteorder": "little", "archive_format": "pt2"}

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, held in (
                dict.fromkeys(pickles, data) | texts | dict.fromkeys(parts, data)
            ).items():
                file.writestr(f"archive/{name}", held)

    return write


def target_of(path: Path) -> str:
    """What `crt audit` is asked about: the file, or the folder of transformers that it is in."""
    return f"hf:{path.parent}" if path.parent.name == "hub" else str(path)


def hub_config(folder: Path) -> None:
    """The configuration of a small model of transformers."""
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9}
    config |= {"architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))


def code(base: Base) -> Iterator[Case]:
    """A pickle, bare and as torch.save has it, under every name that a command reads weights by."""

    def case(name: str, zipped: bool, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = pickle.dumps(Runs(folder / "it_ran"))
        program(data)(path) if zipped else path.write_bytes(data)
        if name.startswith("hub/"):
            hub_config(path.parent)
        refused(folder, "audit", target_of(path))

    def beside(name: str, folder: Path) -> None:
        shutil.copytree(base.rich, folder / "run")
        (folder / "run" / name).write_bytes(pickle.dumps(Runs(folder / "it_ran")))
        generate = ["generate", str(folder / "run"), "a"]
        words = kills.explore(folder) if "traces" in name else generate
        refused(folder, *words, *(["--exit", "gate"] if "gate" in name else []))

    def refused(folder: Path, *words: str) -> None:
        done = crt(folder, *words)
        if (folder / "it_ran").exists():
            raise Lost("code in the file was run")
        one_line(done, 2)

    bare = ("best.safetensors", "x.pt2", "x.onnx")
    for name in (*bare, "hub/pytorch_model.bin", "hub/model.safetensors"):
        for zipped in (False, True):
            yield Case(f"{name}, {'zipped' if zipped else 'bare'}", partial(case, name, zipped))
    for name in ("checkpoints/gate", "traces/valid"):
        yield Case(f"{name}.safetensors", partial(beside, f"{name}.safetensors"))
    yield Case("checkpoints/tokenizer.json", partial(beside, "checkpoints/tokenizer.json"))


def headers(base: Base) -> Iterator[Case]:
    """Headers that say that they are longer than the file, or that tensors lie elsewhere."""
    metadata = {"__metadata__": {"model": "{}", "state": "{}"}}

    def tensor(shape: list[int], begin: int, end: int, kind: str = "F32") -> bytes:
        about = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        return json.dumps(metadata | {"model.x": about}).encode()

    def about(model: str, state: str) -> tuple[None, bytes]:
        return None, json.dumps({"__metadata__": {"model": model, "state": state}}).encode()

    texts: dict[str, tuple[int | None, bytes]] = {
        "beyond the file": (2**40, b"{}"),
        "of 2^63": (2**63, b"{}"),
        "of 2^64 - 1": (2**64 - 1, b"{}"),
        "of 99 MB, cut": (99_000_000, b"{}"),
        "nested deep": (200_000, b"[" * 200_000),
        "no JSON": (9, b"not JSON!"),
        "a list": (2, b"[]"),
        "tensor beyond the file": (None, tensor([1 << 40], 0, 1 << 42)),
        "size that overflows": (None, tensor([1 << 62, 1 << 62], 0, 4)),
        "negative shape": (None, tensor([-1], 0, 4)),
        "end before begin": (None, tensor([1], 8, 4)),
        "unknown kind": (None, tensor([1], 0, 4, "F3")),
        "model of 2^40 words": about(json.dumps({"vocab_size": 1 << 40}), '{"run": {}}'),
        "state that is a list": about("{}", "[]"),
        "state with a list for its run": about("{}", '{"run": []}'),
        "model that is a list": about("[]", "{}"),
    }

    def case(size: int | None, text: bytes, word: str, folder: Path) -> None:
        path = folder / "x.safetensors"
        size = len(text) if size is None else size
        path.write_bytes(struct.pack("<Q", size) + text + b"\0" * 8)
        one_line(crt(folder, word, str(path), seconds=60), 2)

    for name, (size, text) in texts.items():
        for word in ("evaluate", "gate"):
            yield Case(f"{name}, crt {word}", partial(case, size, text, word))


def climbs(base: Base) -> Iterator[Case]:
    """Names of runs, corpora, notebooks, parameters that leave their folder, or are code."""
    ran = "__import__('os').mkdir('it_ran')"
    run = str(base.rich)

    def case(words: Callable[[Path], list[str]], statuses: tuple[int, ...], folder: Path) -> None:
        inner = folder / "inner"
        inner.mkdir()
        kills.notebook(inner)
        done = Child(command(*words(inner), patch=partial(kills.at, inner)), inner).wait()
        left = {p.name for p in folder.rglob("*")} - {"inner", "books", "01_train.ipynb"}
        left -= {".stdout", ".stderr"}
        if done.status:
            one_line(done, *statuses)
            if left:
                raise Lost(f"it left {', '.join(sorted(left)[:3])}")
        else:
            assert 0 in statuses, "it was taken"

    def in_books(*words: str) -> Callable[[Path], list[str]]:
        where = ("--profile", "smoke", "--notebooks")
        return lambda f: [*words, *where, str(f / "books"), "--out", str(f / "out")]

    sweep, reproduce = partial(in_books, "sweep", "01", "--grid"), partial(in_books, "reproduce")

    def train(*words: str) -> Callable[[Path], list[str]]:
        return lambda f: ["train", *words, "--out", str(f / "t")]

    calls: dict[str, Callable[[Path], list[str]]] = {
        "sweep, a value ../../x": sweep("seed=../../x"),
        "sweep, a value that is code": sweep(f"seed={ran}"),
        "sweep, a name ..": sweep("../x=1"),
        "reproduce, a notebook ../../x": reproduce("--only", "../../x"),
        "reproduce, a value that is code": reproduce("-p", f"seed={ran}"),
        "reproduce, a value nested deep": reproduce("-p", "seed=" + "(" * 5000),
        "reproduce, a value of many signs": reproduce("-p", "seed=" + "-" * 20_000 + "1"),
        "reproduce, a name that is code": reproduce("-p", f"{ran}=1"),
        "reproduce, results elsewhere": reproduce("-p", "results=/"),
        "arena ../x": lambda f: ["arena", "../x", "--out", str(f)],
        "a corpus ../x": lambda f: ["lm-task", str(f / "t"), "--corpus", "../x"],
        "a split ../x": lambda f: ["evaluate", run, "--split", "../x"],
        "a profile ../x": train("--profile", "../x"),
        "a recipe ../x": train("--recipe", "../x"),
        "a tokenizer ../x": train("--tokenizer", "../x"),
        "a setting that is code": train(f"--set=train.seed={ran}"),
        "an audited module ../x": lambda f: ["audit", "../x:y"],
        "an audited model hf:../x": lambda f: ["audit", "hf:../x"],
    }
    for name, words in calls.items():
        yield Case(name, partial(case, words, (2,)))

    def text(folder: Path) -> None:
        """A parameter that is text stays text, whatever stands in it."""
        from tiny_notebooks import write_notebook

        value = f'"; {ran}; #\n\\"""\'\'\' {{x}} {ran}'
        parameters = "profile: str = ''\nresults: str = ''\nfresh: bool = False\nname: str = ''"
        cell = "from pathlib import Path\nPath(results, 'said').write_text(name)"
        write_notebook(folder / "books", "01_say", cell, parameters=parameters)
        done = Child(
            command(*reproduce("-p", f"name={value}")(folder), patch=partial(kills.at, folder)),
            folder,
        ).wait()
        assert done.status == 0, done.err[-300:]
        said = (folder / "out/said").read_text()
        assert said == value, f"it became {said!r}"
        if list(folder.rglob("it_ran")):
            raise Lost("code in a parameter was run")

    yield Case("reproduce, a text that is code", text)


def html(base: Base) -> Iterator[Case]:
    """A run's folder, and the text that it learned, are HTML."""

    def named(words: Callable[[Path, Path], list[str]], folder: Path) -> None:
        run = folder / HOSTILE
        shutil.copytree(base.rich, run)
        out = folder / "page.html"
        done = crt(folder, *words(run, out))
        assert done.status == 0, done.err[-300:]
        _harmless(out)

    calls: dict[str, Callable[[Path, Path], list[str]]] = {
        "explore": lambda run, out: ["explore", str(run), "--html", str(out)],
        "audit": lambda run, out: ["audit", str(run), "--html", str(out), "--only-causality"],
    }
    for name, words in calls.items():
        yield Case(f"{name}, a folder's name", partial(named, words))

    def learned(folder: Path) -> None:
        corpus = folder / "text"
        corpus.mkdir()
        for split in ("train", "valid", "test"):
            (corpus / f"{split}.txt").write_text(
                "<script>x()</script> <img src=x onerror=x()>\n\n" * 300
            )
        done = crt(folder, *kills.train_words(folder / "run", corpus))
        assert done.status == 0, done.err[-300:]
        done = crt(folder, *kills.explore(folder))
        assert done.status == 0, done.err[-300:]
        _harmless(folder / "page.html")

    yield Case("explore, a passage", learned)

    def raised(folder: Path) -> None:
        lines = "def model(ids):\n"
        lines += f"    raise ValueError({HOSTILE!r})\n"
        (folder / "broken.py").write_text(lines)
        words = ["audit", "broken:model", "--vocab-size", "9", "--html", str(folder / "page.html")]
        done = Child(command(*words, patch=partial(kills.at, folder)), folder).wait()
        assert done.status == 2 and "Traceback" not in done.err, done.err[-300:]
        if (folder / "page.html").exists():
            _harmless(folder / "page.html")

    yield Case("audit, what a model raises", raised)

    def notebook(folder: Path) -> None:
        """A parameter that is HTML, which the notebook prints, raises nothing and is escaped."""
        from tiny_notebooks import write_notebook

        parameters = "profile: str = ''\nresults: str = ''\nfresh: bool = False\nname: str = ''"
        write_notebook(folder / "books", "01_say", "print(name)\nname", parameters=parameters)
        words = ["reproduce", "--profile", "smoke", "--notebooks", str(folder / "books")]
        done = crt(folder, *words, "--out", str(folder / "out"), "-p", f"name={HOSTILE}")
        assert done.status == 0, done.err[-300:]
        page = folder / "out/notebooks/01_say.html"
        printed = escape(HOSTILE, quote=False)
        assert printed in page.read_text(), "the page has not what was printed"
        _harmless(page)

    yield Case("reproduce, a parameter", notebook)

    def card(folder: Path) -> None:
        """A folder's name on the card: data in its front matter, escaped in its text."""
        from huggingface_hub import ModelCard

        out = folder / HOSTILE
        done = crt(folder, "export", str(base.run), str(out), "--license", "mit")
        assert done.status == 0, done.err[-300:]
        found = ModelCard.load(out / "README.md")
        assert found.data.model_name == HOSTILE, f"the name became {found.data.model_name!r}"
        (folder / "text.html").write_text(found.text)
        _harmless(folder / "text.html")

    def license(value: str, folder: Path) -> None:
        before = contents(folder)
        one_line(crt(folder, "export", str(base.run), str(folder / "x"), "--license", value), 2)
        if contents(folder) != before:
            raise Lost("a folder is left, though the licence was refused")

    yield Case("export, a folder's name on the card", card)
    for value in (HOSTILE, "no such <script>", "mit\n---\n<script>", "a: &a [*a]"):
        yield Case(f"export --license {value!r}", partial(license, value))


def _harmless(page: Path) -> None:
    """AssertionError where the page has an element that is not its own."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    assert not soup.find_all("img", src="x"), "an image from a name"
    scripts = [script for script in soup.find_all("script") if re.match(r"\s*x\(\)", script.text)]
    assert not scripts, "a script from a name"
    assert not soup.find_all(attrs={"onerror": True}), "an attribute from a name"


def server(base: Base) -> Iterator[Case]:
    """What listens while `crt explore` serves, and how it ends."""

    def case(port: int, number: signal.Signals, folder: Path) -> None:
        shutil.copytree(base.rich, folder / "run")
        words = ["explore", str(folder / "run"), "--no-browser", "--port", str(port)]
        child = Child(command(*words), folder)
        while not (found := _listening(child)) and child.ended(0.1) is None:
            pass
        assert found, f"nothing listens: {child.said()}"
        taken, done = child.stop(number)
        assert {address for address, _ in found} == {"127.0.0.1"}, f"it listens at {found}"
        assert taken < 2 and "Traceback" not in done.err, f"{taken:.1f} s, {done.err[-200:]}"

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for number in (signal.SIGINT, signal.SIGTERM):
        yield Case(f"any port, {number.name}", partial(case, 0, number))
        yield Case(f"a port, {number.name}", partial(case, port, number))

    def taken(folder: Path) -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            held.listen()
            port = str(held.getsockname()[1])
            one_line(crt(folder, "explore", str(base.rich), "--no-browser", "--port", port), 2)

    yield Case("a port that is taken", taken)


def _listening(child: Child) -> list[tuple[str, int]]:
    found = child.process.net_connections(kind="inet")
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]
