"""Clocks that go backwards, and checkpoints of older versions and of other configurations."""

import itertools
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kills
from base import Base
from harness import Case, Child, Kind, command, contents, crt, one_line, same

from crt_lib.config import ModelConfig

HOUR, DAY = 3600, 86_400


def kinds(base: Base) -> Iterator[Kind]:
    """The kinds of this module."""
    yield Kind("clock that goes backwards", "the same files as ever", clocks(base))
    yield Kind("checkpoint of an older version", "scored as the new file is", older(base))
    holds = "one line, exit status 2, no file is changed"
    yield Kind("file of another configuration", holds, others(base))


def _shifted(seconds: float, after: int | None = None) -> None:
    """In this process the clock is `seconds` later; with `after`, only from so many calls on."""
    import datetime

    from crt_lib.runs import manifest

    real, calls = time.time, itertools.count()

    def shift() -> float:
        return seconds if after is None or next(calls) >= after else 0.0

    class Clock(datetime.datetime):
        """What the manifest asks for the time."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(real() + shift(), tz)

    time.time = lambda: real() + shift()
    time.time_ns = lambda: int(1e9 * (real() + shift()))
    manifest.datetime = Clock  # type: ignore[misc]


def clocks(base: Base) -> Iterator[Case]:
    """A clock that is set back between a kill and what goes on, or jumps in the middle of a run."""

    def train(folder: Path, clock: Callable[[], None], moment: float | None = None) -> None:
        child = Child(command(*base.train(folder / "run"), patch=clock), folder)
        if moment is not None and child.ended(moment) is None:
            child.kill()
            return
        done = child.wait()
        assert done.status == 0, done.err[-300:]

    def resumed(moment: float, seconds: float, folder: Path) -> None:
        train(folder, partial(_shifted, 0), moment)
        train(folder, partial(_shifted, seconds))
        same(folder / "run", base.trained)

    def jumps(seconds: float, after: int, folder: Path) -> None:
        train(folder, partial(_shifted, seconds, after))
        same(folder / "run", base.trained)

    def future(folder: Path) -> None:
        """A killed run whose files are of tomorrow."""
        train(folder, partial(_shifted, 0), 0.6)
        for path in [*folder.rglob("*"), *base.corpus.iterdir()]:
            later = time.time() + DAY
            os.utime(path, (later, later))
        train(folder, partial(_shifted, 0))
        same(folder / "run", base.trained)

    for moment in (0.3, 0.6, 1.0):
        yield Case(f"killed after {moment} s, an hour earlier", partial(resumed, moment, -HOUR))
    for seconds in (-DAY, DAY):
        for after in (1, 3):
            name = f"{'back' if seconds < 0 else 'on'} by a day at call {after}"
            yield Case(name, partial(jumps, seconds, after))
    yield Case("files of tomorrow", future)


def older(base: Base) -> Iterator[Case]:
    """Checkpoints as older versions wrote them: two texts, fewer settings, settings that went."""

    def scored(folder: Path) -> str:
        done = crt(folder, "evaluate", str(folder / "run"))
        assert done.status == 0, done.err[-300:]
        return done.out.replace(str(folder), "")

    def case(change: Callable[[dict[str, str]], dict[str, str]], folder: Path) -> None:
        shutil.copytree(base.run, folder / "run")
        expected = scored(folder)
        path = folder / "run/checkpoints/best.safetensors"
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        kept = json.loads(header["__metadata__"]["checkpoint"])
        header["__metadata__"] = change(kept)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        found = scored(folder)
        assert found == expected, f"scored otherwise: {found[-200:]}"

    def texts(kept: dict[str, Any]) -> dict[str, str]:
        return {name: json.dumps(kept[name]) for name in ("model", "state")}

    def turned(kept: dict[str, Any]) -> dict[str, str]:
        return dict(reversed(texts(kept).items()))

    def fewer(kept: dict[str, Any]) -> dict[str, str]:
        """Without the settings that are at their defaults, as those that came later are."""
        default = ModelConfig().to_dict()
        own = {k: v for k, v in kept["model"].items() if v != default[k]}
        return texts(kept | {"model": own})

    def gone(kept: dict[str, Any]) -> dict[str, str]:
        """With a setting that is no more, where it did nothing."""
        run = kept["state"]["run"]
        run = run | {"train": run["train"] | {"exits_start": 0.0}}
        return texts(kept | {"state": kept["state"] | {"run": run}})

    yield Case("two texts", partial(case, texts))
    yield Case("two texts, the other order", partial(case, turned))
    yield Case("without the settings that came later", partial(case, fewer))
    yield Case("with a setting that went", partial(case, gone))


def others(base: Base) -> Iterator[Case]:
    """A run with one file of a run of another shape, or gone on with by other settings."""

    def other(folder: Path) -> Path:
        """A run of three loops, another width and vocabulary, with its gate."""
        run, shape = folder / "other", ["n_loops=3", "exit_loops=[1,2]", "d_model=32"]
        words = [*kills.train_words(run, base.corpus), *(f"--set=model.{one}" for one in shape)]
        words[words.index("bpe:300")] = "bpe:280"
        for call in (words, ["gate", str(run)]):
            done = crt(folder, *call)
            assert done.status == 0, done.err[-300:]
        return run

    def refused(words: list[str], folder: Path) -> None:
        before = contents(folder / "run")
        one_line(crt(folder, *words), 2)
        same(folder / "run", before, "though refused:")

    def mixed(name: str, words: Callable[[Path], list[str]], folder: Path) -> None:
        shutil.copytree(base.rich, folder / "run")
        shutil.copy(other(folder) / "checkpoints" / name, folder / "run/checkpoints" / name)
        refused(words(folder), folder)

    def changed(setting: str, folder: Path) -> None:
        shutil.copytree(base.run, folder / "run")
        refused([*base.train(folder / "run"), f"--set={setting}"], folder)

    def generate(*more: str) -> Callable[[Path], list[str]]:
        return lambda folder: ["generate", str(folder / "run"), "the river", "--tokens", "2", *more]

    files = {
        "best.safetensors": generate("--exit", "full"),
        "tokenizer.json": generate("--exit", "full"),
        "gate.safetensors": generate("--exit", "gate", "--tau0", "0.5"),
        "last.safetensors": base.resumed,
    }
    for name, words in files.items():
        yield Case(name, partial(mixed, name, words))
    for setting in ("train.seed=9", "train.updates=31", "model.n_loops=3", "train.max_lr=0.5"):
        yield Case(setting, partial(changed, setting))
