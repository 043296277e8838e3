"""Bombs: zip, JSON and YAML that unpack to far more than they are."""

import io
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from base import Base
from foes import hub_config, program, target_of
from harness import Case, Done, Kind, Lost, crt, one_line
from limits import address_space

SECONDS, MEMORY = 60, 2 << 30  # for a bomb; of address space, beyond what the imports take
HUGE = 8 << 30  # bytes, that a bomb unpacks to


def kinds(base: Base) -> Iterator[Kind]:
    """The kinds of this module."""
    limits = f"refused in one line, in {SECONDS} s and {MEMORY >> 30} GB"
    yield Kind("zip bomb", limits, zip_bombs())
    yield Kind("JSON bomb", limits, json_bombs(base))
    yield Kind(
        "YAML bomb",
        f"nothing here reads YAML: such a folder is audited, in {SECONDS} s and {MEMORY >> 30} GB, "
        "and written over",
        yaml_bombs(base),
    )


def _small(folder: Path, *words: str) -> Done:
    """The command in little memory, and within SECONDS."""
    return crt(folder, *words, seconds=SECONDS, memory=address_space() + MEMORY)


def zip_bombs() -> Iterator[Case]:
    """Programs of torch.export and files of torch.save that unpack to more than they are."""
    megabyte = b"\0" * (1 << 20)

    @cache
    def bomb() -> bytes:
        """Members of HUGE bytes in all, packed to a thousandth."""
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
            for name in ("data.pkl", "models/model.json"):
                with file.open(f"x/{name}", "w", force_zip64=True) as member:
                    for _ in range(HUGE >> 21):
                        member.write(megabyte)
            file.writestr("x/version", "3")
        return made.getvalue()

    def packed(path: Path) -> None:
        path.write_bytes(bomb())

    def lies(path: Path, size: int, kind: int = zipfile.ZIP_STORED) -> None:
        """Members that are said to have `size` bytes."""
        program(b"{}")(path)
        data = bytearray(path.read_bytes())
        for mark, at in ((b"PK\x01\x02", 20), (b"PK\x03\x04", 18)):
            place = data.find(mark)
            while place >= 0:
                data[place + at : place + at + 8] = struct.pack("<II", size, size)
                data[place + at // 2 : place + at // 2 + 2] = struct.pack("<H", kind)
                place = data.find(mark, place + 4)
        path.write_bytes(data)

    def overlap(path: Path) -> None:
        """Members that are all the same bytes."""
        program(b" " * 3_000_000)(path)
        data = path.read_bytes()
        end = data.rfind(b"PK\x05\x06")
        size, start = struct.unpack("<II", data[end + 12 : end + 20])
        index, times = data[start : start + size], 400
        count = struct.unpack("<H", data[end + 10 : end + 12])[0] * times
        tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, times * size, start, 0)
        path.write_bytes(data[:start] + index * times + tail)

    ways: dict[str, Callable[[Path], None]] = {
        "packed": packed,
        "said to be 4 GB": partial(lies, size=0xFFFFFFF0),
        "said to be empty": partial(lies, size=0),
        "said to be packed": partial(lies, size=1 << 30, kind=zipfile.ZIP_DEFLATED),
        "members that overlap": overlap,
    }

    def case(name: str, write: Callable[[Path], None], word: str, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write(path)
        if name.startswith("hub/"):
            hub_config(path.parent)
        one_line(_small(folder, word, target_of(path)), 2)

    read = {"x.pt2": "audit", "hub/pytorch_model.bin": "audit", "x.safetensors": "evaluate"}
    for way, write in ways.items():
        for name, word in read.items():
            yield Case(f"{name}, {way}", partial(case, name, write, word))


def json_bombs(base: Base) -> Iterator[Case]:
    """Texts of a million brackets, and of millions of values, wherever JSON is read."""
    many = 1_000_000
    texts: dict[str, Callable[[], str]] = {
        "nested lists": lambda: "[" * many + "]" * many,
        "nested objects": lambda: '{"a":' * many + "1" + "}" * many,
        "a huge list": lambda: "[" + "1," * (10 * many) + "1]",
        "a huge list in an object": lambda: '{"model": [' + "[]," * (5 * many) + "1]}",
        "a huge number": lambda: '{"model_type": ' + "9" * many + "}",
        "many names": lambda: "{" + ",".join(f'"k{i}": {i}' for i in range(many)) + "}",
    }

    def resumed(folder: Path) -> list[str]:
        return base.train(folder / "run")

    def generate(folder: Path) -> list[str]:
        return ["generate", str(folder / "run"), "the river", "--tokens", "2"]

    def audit(folder: Path) -> list[str]:
        return ["audit", f"hf:{folder / 'hub'}", "--only-causality"]

    def case(name: str, text: Callable[[], str], words: Any, folder: Path) -> None:
        shutil.copytree(base.rich, folder / "run")
        if name.startswith("hub/"):
            (folder / "hub").mkdir()
        (folder / name).write_text(text())
        one_line(_small(folder, *words(folder)), 2)

    reads = {
        "run/checkpoints/tokenizer.json": generate,
        "run/checkpoints/exits.json": generate,
        "run/manifest.json": resumed,
        "hub/config.json": audit,
    }
    for name, words in reads.items():
        for said, text in texts.items():
            yield Case(f"{name}: {said}", partial(case, name, text, words))


def yaml_bombs(base: Base) -> Iterator[Case]:
    """Front matter whose anchors come to a billion words, in the README.md of a model's folder."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 10):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    bomb = "\n".join(["---", *lines, "---", ""])

    def case(again: bool, folder: Path) -> None:
        hub = folder / "hub"
        done = crt(folder, "export", str(base.run), str(hub))
        assert done.status == 0, done.err[-300:]
        card = (hub / "README.md").read_text()
        (hub / "README.md").write_text(bomb)
        words = ["export", str(base.run), str(hub)] if again else ["audit", f"hf:{hub}"]
        done = _small(folder, *words)
        assert done.status == 0 and "Traceback" not in done.err, done.err[-300:]
        if again and (hub / "README.md").read_text() != card:
            raise Lost("the card is not what it was")

    yield Case("crt audit hf:FOLDER", partial(case, False))
    yield Case("crt export into the folder", partial(case, True))
