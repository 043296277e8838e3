"""What a model knows of the language of look-ups: right answers by loop and by look-ups needed."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from crt_lib.cached.step import evaluating
from crt_lib.evaluate import device_of, logits_of
from crt_lib.exits.gate import fit_gate
from crt_lib.exits.policy import full_pass
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.text import lookup

if TYPE_CHECKING:
    from crt_lib.config import LanguageModel
    from crt_lib.study.trial import Row
    from crt_lib.text.tokenizer import TokenizedCorpus, TokenSplit

AT_ONCE = 250  # lines
FARTHER = 8  # loops that a looped model is run with, though it was trained with fewer
FITTED = 2_000  # lines of train that a gate is fitted to


def right_answers(
    model: "LanguageModel", split: "TokenSplit", n_loops: int | None = None
) -> list["Row"]:
    """A row for each loop and number of look-ups: how many were `asked`, and the share `right`.

    Of each line's first question, where no earlier answer can save look-ups; `right_all` is of all
    questions. A line is read by itself, and an answer is right where its word is the likeliest.
    `n_loops` of a CRT: more than it has (`full_pass`). Raises InputError for a split that is not of
    whole lines of the language.
    """
    ids, columns, steps = lines_of(split)
    right: dict[int, list[np.ndarray]] = {}
    with torch.inference_mode(), evaluating(model):
        for first in range(0, len(ids), AT_ONCE):
            batch = torch.from_numpy(ids[first : first + AT_ONCE]).to(device_of(model))
            if n_loops and isinstance(model, CRT):
                by_loop = {loop.number: loop.logits for loop in full_pass(model, batch, n_loops)}
            else:
                by_loop = logits_of(model, batch)
            for loop, logits in by_loop.items():
                guess = logits[:, columns - 1].argmax(-1) == batch[:, columns]
                right.setdefault(loop, []).append(guess.cpu().numpy())
    rows = []
    for loop, parts in right.items():
        answered = np.concatenate(parts)
        for needed in np.unique(steps).tolist():
            first = answered[steps[:, 0] == needed, 0]
            row = {"loop": loop, "steps": needed, "asked": first.size, "right": first.mean()}
            rows.append(row | {"right_all": answered[steps == needed].mean()})
    return rows


def lines_of(split: "TokenSplit") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the lines (lines, length), the columns of their answers, and the look-ups of each."""
    words = [split.tokenizer.decode([i]) for i in range(split.tokenizer.vocab_size)]
    length = lookup.length(sum(word.endswith(":") for word in words))
    if len(split.ids) % length:
        raise InputError(f"the text is not of lines of {length} words; use corpus 'lookup'")
    ids = split.ids.reshape(-1, length).astype(np.int64)
    numbers = np.array([int(word) if word.isdigit() else 0 for word in words])
    columns, steps = lookup.questions(ids, numbers)
    return ids, columns, steps


def gate_exits(
    model: CRT, data: "TokenizedCorpus", threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Look-ups needed by the first question of each line of test, and the loop where a gate exits.

    Both are (lines,). The gate is fitted to the text of train (`fit_gate`), so to the model's own
    last exit and to no answer; a token exits at the first loop that it expects within `threshold`
    of that (the square root of nats), or at the last.
    """
    ids, columns, steps = lines_of(data.test)
    length = ids.shape[1]
    train = data.train.ids[: FITTED * length]
    gate = fit_gate(model, train, data.tokenizer.eot_id, seq_len=length)
    asked = torch.from_numpy(ids[:, : columns[0]]).to(device_of(model))
    exits = np.full(len(ids), model.config.n_loops)
    with torch.inference_mode(), evaluating(model):
        for loop in reversed(list(full_pass(model, asked))[:-1]):
            near = gate.distance(loop.number, loop.z[:, -1]) <= threshold
            exits[near.cpu().numpy()] = loop.number
    return steps[:, 0], exits


def staircase(rows: list["Row"]) -> pd.DataFrame:
    """The share right, loops down and look-ups across, the mean of what `rows` have of each."""
    return pd.DataFrame(rows).pivot_table("right", "loop", "steps")
