"""Files that are damaged, in every way, and the commands that read them."""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import kills
from base import Base
from harness import Case, Child, Kind, Lost, command, one_line

LONG = 100_000_000  # bytes of a long line
SHORT = ("text/train.txt", "text/test.txt")  # not damaged in ways of which nothing can be told


def kinds(base: Base, seed: int) -> Iterator[Kind]:
    """The kinds of this module."""
    holds = "exit status 0 or one line that says so, no traceback; no other file is changed"
    yield Kind("damaged file", holds, damages(base, seed))


def _flip(position: float, data: bytes) -> bytes:
    at = min(len(data) - 1, int(position * len(data)))
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _ways(rng: random.Random, text: bool) -> dict[str, Callable[[Path], None]]:
    """Ways to damage a file, or a text."""

    def rewritten(change: Callable[[bytes], bytes], path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    long = LONG // 400 if text else LONG  # to score more takes minutes
    changes: dict[str, Callable[[bytes], bytes]] = {
        "0 bytes": lambda d: b"",
        "half of it": lambda d: d[: len(d) // 2],
        "without its last byte": lambda d: d[:-1],
        "not UTF-8": lambda d: d[: len(d) // 2] + b"\xff\xfe" + d[len(d) // 2 :],
        f"a line of {long / 1e6:g} MB": lambda d: b"x" * long + b"\n" + d,
        "nested deep": lambda d: b"[" * 200_000,
    }
    for place in (0.0, 0.002, 0.01, 0.1, 0.5, 0.97):
        position = min(0.9999, place + rng.random() * 0.01)
        changes[f"a bit at {position:.1%}"] = partial(_flip, position)
    found = {name: partial(rewritten, change) for name, change in changes.items()}
    return {**found, "a folder": folder, "a loop of links": loop}


def damages(base: Base, seed: int) -> Iterator[Case]:
    """Every file that a command reads, damaged in every way."""

    def generate(*more: str) -> Callable[[Path], list[str]]:
        return lambda folder: ["generate", str(folder / "run"), "the river", "--tokens", "4", *more]

    def trained(folder: Path) -> list[str]:
        where = ["--corpus", str(folder / "text"), "--tokenizer", "bpe:300"]
        where += ["--out", str(folder / "new"), "--set=train.updates=1"]
        return ["train", "--profile", "smoke", "--quiet", *where]

    def sweep(f: Path) -> list[str]:
        where = ["--notebooks", str(f / "books"), "--out", str(f / "out")]
        return ["sweep", "01", "--grid", "seed=x", "--profile", "smoke", *where]

    reads = {
        "run/checkpoints/best.safetensors": generate("--exit", "full"),
        "run/checkpoints/best.safetensors.sha256": generate("--exit", "full"),
        "run/checkpoints/tokenizer.json": generate("--exit", "full"),
        "run/checkpoints/gate.safetensors": generate("--exit", "gate", "--tau0", "0.5"),
        "run/checkpoints/exits.json": generate(),
        "run/checkpoints/last.safetensors": base.resumed,
        "run/manifest.json": base.resumed,
        "run/metrics.jsonl": base.resumed,
        "run/timing.jsonl": base.resumed,
        "run/config.json": base.resumed,
        "run/results.csv": lambda f: base.train(f / "run"),
        "run/traces/valid.safetensors": kills.explore,
        "run/policies.csv": kills.explore,
        "text/valid.txt": trained,
        "text/train.txt": trained,
        "text/test.txt": trained,
        "books/01_train.ipynb": sweep,
    }

    def case(name: str, damage: Callable[[Path], None], folder: Path) -> None:
        shutil.copytree(base.rich, folder / "run")
        shutil.copytree(base.corpus, folder / "text")
        kills.notebook(folder)
        damage(folder / name)
        words = reads[name](folder)
        before = {
            path: path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.stem != "manifest"
        }
        done = Child(command(*words), folder).wait()
        if done.status:
            one_line(done, 1, 2)
            gone = [str(p.relative_to(folder)) for p, was in before.items() if not _is(p, was)]
            if gone:
                raise Lost(f"changed, though refused: {', '.join(gone[:4])}")
        else:
            assert "Traceback" not in done.err
            if name.endswith("best.safetensors"):
                raise Lost("a damaged checkpoint was taken, though its checksum lay beside it")

    for name in reads:
        ways = _ways(random.Random(f"{seed} {name}"), text=name.startswith("text/"))
        for way, damage in ways.items():
            if name not in SHORT or way in ("0 bytes", "not UTF-8", "a folder", "a loop of links"):
                yield Case(f"{name}: {way}", partial(case, name, damage))
    longest = partial(case, "text/train.txt", _on_a_line)  # of valid or test it would be scored
    yield Case(f"text/train.txt: a line of {LONG / 1e6:g} MB, of words", longest)


def _on_a_line(path: Path) -> None:
    words = b"the stone is cold and "
    path.write_bytes(words * (LONG // len(words)) + b"\n" + path.read_bytes())


def _is(path: Path, was: bytes) -> bool:
    return path.name in (".stdout", ".stderr") or (path.is_file() and path.read_bytes() == was)
