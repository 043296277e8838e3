"""The run that faults are tried on."""

import shutil
from pathlib import Path

import kills
from harness import contents, crt

from crt_lib.files import sha256


class Base:
    """A finished training with traces, a gate and calibrated exits, and the text that it is of."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.corpus, self.run, self.whole = folder / "text", folder / "run", folder / "whole"
        self.whole.mkdir()
        kills.text(self.corpus)
        self._must(folder, *kills.train_words(self.run, self.corpus))
        self.trained = contents(self.run)
        self.rich = folder / "rich" / "run"
        shutil.copytree(self.run, self.rich)
        self._must(folder, *kills.explore(self.rich.parent))
        self._must(folder, "calibrate", str(self.rich))
        best = self.rich / "checkpoints/best.safetensors"
        best.with_name(f"{best.name}.sha256").write_text(
            f"{sha256(best.read_bytes())}  {best.name}\n"
        )

    def _must(self, folder: Path, *words: str) -> None:
        done = crt(folder, *words)
        assert done.status == 0, f"{words[0]}: {done.err[-500:]}"

    def train(self, out: Path) -> list[str]:
        """The words of the training that `run` is of, in another folder."""
        return kills.train_words(out, self.corpus)

    def resumed(self, folder: Path) -> list[str]:
        """The words of a training in `folder`/run that goes on from `last`."""
        path = folder / "run/manifest.json"
        if path.is_file() and (text := path.read_bytes()).count(b'"done"'):
            path.write_bytes(text.replace(b'"done"', b'"stopped"'))
        return self.train(folder / "run")
