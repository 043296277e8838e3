"""Planted flaws of scores and sound scores: what `crt_lib.audit.checks` is held against.

Each is made and judged by a function without arguments, which gives its checks. Of what is planted,
the beginning of the name of the one check that is to fail stands beside it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit import checks
from crt_lib.audit.checks import Check
from crt_lib.audit.protocols import padding_report
from crt_lib.data import evaluation_windows
from crt_lib.text import grammar
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import Tokenizer, load_tokenizer

WINDOW, STRIDE = 32, 8
TEXT = np.random.default_rng(0).integers(1, 40, 301)  # 0 is padding
LINES = [TEXT[i : i + 5 + i % 20] for i in range(0, 200, 20)]
ROWS = torch.from_numpy(TEXT[: 9 * WINDOW]).view(9, WINDOW)


def _windows(
    stride: int = WINDOW, all_scored: bool = False, whole_ones: bool = False
) -> list[Check]:
    """Of the windows of TEXT: `all_scored` what they share is scored in each."""
    found = []
    for batch in evaluation_windows(TEXT, WINDOW, 4, 0, stride):
        inputs, targets = batch.inputs, batch.targets
        if all_scored:  # what comes after a token of the inputs, and the last one as it was
            targets = torch.cat([inputs[:, 1:], targets[:, -1:]], 1)
        if targets.shape[1] == WINDOW or not whole_ones:
            found.append(targets)
    return [checks.windows_check(TEXT, found)]


def _shifted(by: int) -> list[Check]:
    return [checks.targets_check(ROWS[:, 4:20], ROWS[:, 4 + by : 20 + by])]


def _padded() -> list[Check]:
    """A model that has learned that padding follows padding, and nothing else."""

    def model(ids: Tensor) -> Tensor:
        return 20.0 * F.one_hot(torch.where(ids == 0, 0, 39), 40) * (ids == 0)[..., None]

    return checks.padding_check(padding_report(model, LINES, 0, seq_len=48))


@cache
def words() -> Tokenizer:
    """The grammar's words, each a token."""
    return load_tokenizer("word", load_corpus("grammar"))


def grammars_own(peeks: Callable[[Tensor], Any] = lambda t: t < 0, size: float = 1.0) -> Any:
    """The grammar itself as a model; `size` of the next token is added where `peeks` at t."""
    order = torch.tensor([int(words().encode(word)[0]) for word in grammar.words()])
    table = torch.full((words().vocab_size,) * 2, -torch.inf, dtype=torch.float64)
    table[order[:, None], order] = torch.from_numpy(grammar.transitions().copy()).log()

    def model(ids: Tensor) -> Tensor:
        ahead = F.pad(F.one_hot(ids[:, 1:], len(table)), (0, 0, 0, 1))
        return table[ids] + size * ahead * peeks(torch.arange(ids.shape[1]))[:, None]

    return model


def _entropy(*peeks: Any) -> list[Check]:
    return checks.entropy_check(grammars_own(*peeks), words())


def _tokenizer(encode: Callable[[str], Any], decode: Callable[[Any], str]) -> list[Check]:
    texts = ["Plain.", "Two  spaces", "\u00c9t\u00e9\n"]
    return [checks.tokenizer_check(encode, decode, texts)]


Judged = Callable[[], list[Check]]
_BY_CHECK: dict[str, dict[str, Judged]] = {
    "each token": {
        "windows that overlap, all of each scored": partial(_windows, STRIDE, True),
        "windows that overlap by one, all scored": partial(_windows, WINDOW - 1, True),
        "the end that fills no window is dropped": partial(_windows, whole_ones=True),
        "rows whose first token nothing predicts": lambda: [
            checks.windows_check(ROWS.flatten().numpy(), [ROWS[:, 1:]])
        ],
    },
    "padding": {"padding is scored": _padded},
    "targets": {
        "targets are the inputs": partial(_shifted, 0),
        "targets are shifted twice": partial(_shifted, 2),
        "targets are what came before": partial(_shifted, -1),
    },
    "no loss below": {
        "a loss a little below the entropy": lambda: _entropy(lambda t: t >= 0, 0.2),
        "a loss below the entropy at one position": lambda: _entropy(lambda t: t == 50, 9.0),
    },
    "the tokenizer": {
        "a tokenizer that splits at white space": partial(_tokenizer, str.split, " ".join),
        "a tokenizer without capitals": lambda: _tokenizer(str.lower, str),
        "a tokenizer of ASCII alone": lambda: _tokenizer(
            lambda text: text.encode("ascii", "replace"), bytes.decode
        ),
    },
}
FLAWED = {name: (make, check) for check, flaws in _BY_CHECK.items() for name, make in flaws.items()}
SOUND: dict[str, Judged] = {
    "windows side by side": _windows,
    "windows that overlap, new tokens scored": partial(_windows, STRIDE),
    "windows that overlap by one": partial(_windows, WINDOW - 1),
    "targets are the next tokens": partial(_shifted, 1),
    "the grammar itself": _entropy,
    "a tokenizer of bytes": partial(_tokenizer, str.encode, bytes.decode),
}
