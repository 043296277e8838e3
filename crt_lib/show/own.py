"""One's own text and one's own run in the explorer's widget: read from a file, or a folder."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crt_lib.exits.trace import Trace, make_passage
from crt_lib.files import InputError
from crt_lib.show.explorer_page import Explored
from crt_lib.study.analysis import analyse

if TYPE_CHECKING:
    from crt_lib.model import CRT
    from crt_lib.text.tokenizer import Tokenizer

PARTS = 16  # of a file that are read


def uploaded(value: Any) -> str:
    """The text of the file in a `FileUpload`'s value, as ipywidgets 7 or 8 have it.

    Raises InputError for what is not text in UTF-8.
    """
    (file, *_) = value.values() if isinstance(value, dict) else value
    try:
        return bytes(file["content"]).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the file is not text in UTF-8: {error}") from error


def parts_of(tokenizer: "Tokenizer", text: str, most: int) -> list[str]:
    """`text` cut into parts of at most `most` tokens: between words, where no word is longer."""
    parts, tokens = [""], 0
    words = re.findall(r"\s*\S+|\s+$", text)
    sizes = [len(tokenizer.encode(word)) for word in words]
    if max(sizes, default=0) > most:
        words = re.findall(rf"(?s).{{1,{max(1, most // 4)}}}", text)  # a letter has 4 bytes at most
        sizes = [len(tokenizer.encode(word)) for word in words]
    for word, size in zip(words, sizes, strict=True):
        if parts[-1] and tokens + size > most:
            parts.append("")
            tokens = 0
        parts[-1] += word
        tokens += size
    return parts


class OwnText:
    """A text area, a file and a button; `show` is called with the passage that was read.

    `box` is the widget. A file is read in parts, among which `part` chooses. Of what cannot be
    read `said` says why, and the passage before stays.
    """

    def __init__(self, reader: "tuple[CRT, Tokenizer]", text: str, show: Callable[[Trace], None]):
        import ipywidgets as w

        self.reader, self.show = reader, show
        self.passages: list[Trace] = []
        wide = w.Layout(width="620px", height="80px")
        self.text = w.Textarea(text, description="your text", layout=wide)
        self.read, self.said = w.Button(description="read it"), w.HTML()
        self.file = w.FileUpload(accept=".txt,.md", description="or a file", multiple=False)
        self.progress = w.IntProgress(0, 0, PARTS)
        self.part = w.Dropdown(options=[1], description="part", disabled=True)
        self.read.on_click(lambda _: self._guarded(lambda: [self.text.value]))
        self.file.observe(self._uploaded, "value")
        self.part.observe(self._chosen, "value")
        beside = [self.read, self.file, self.progress, self.part, self.said]
        self.box = w.HBox([self.text, w.VBox(beside)])

    def _uploaded(self, change: dict[str, Any]) -> None:
        if change["new"]:
            self._guarded(self._parts)

    def _parts(self) -> list[str]:
        """Of the file, those that are read."""
        model, tokenizer = self.reader
        return parts_of(tokenizer, uploaded(self.file.value), model.config.max_seq_len)

    def _guarded(self, make: Callable[[], list[str]]) -> None:
        try:
            texts, found = make(), []
            kept = texts[:PARTS]
            self.progress.value, self.progress.max = 0, len(kept)
            for text in kept:
                found.append(make_passage(*self.reader, text))
                self.progress.value += 1
        except InputError as error:
            self.said.value = html.escape(str(error))
            return
        self.passages = found
        left = len(texts) > len(kept)
        self.said.value = f"the first {PARTS} of {len(texts)} parts" if left else ""
        self.part.options, self.part.disabled = [*range(1, len(found) + 1)], len(found) == 1
        self.show(found[0])

    def _chosen(self, change: Any) -> None:
        if change["new"] is not None and change["new"] <= len(self.passages):
            self.show(self.passages[change["new"] - 1])


class OwnRun:
    """A field for a run's folder; `show` is called with what `Explored` has of it.

    What the run lacks is made, which takes minutes.
    """

    def __init__(self, show: Callable[[Explored, Any], None]):
        import ipywidgets as w

        self.show = show
        self.folder = w.Text(placeholder="results/mine", description="your run")
        self.open, self.said = w.Button(description="open it"), w.HTML()
        self.open.on_click(self._open)
        self.box = w.HBox([self.folder, self.open, self.said])

    def _open(self, _: Any) -> None:
        self.said.value = "reading; a run without traces gets them, in minutes"
        try:
            found = analyse(Path(self.folder.value or "nowhere"))
            self.show(Explored.of(found), (found.model, found.tokenizer))
        except (InputError, OSError) as error:
            self.said.value = html.escape(str(error))
            return
        self.said.value = ""
