"""What a model knows of the language of look-ups: right answers by loop and by look-ups needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crt_lib.cached.step import evaluating
from crt_lib.checkpoint import RunFolder, load_model
from crt_lib.evaluate import logits_of
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.model import CRT
from crt_lib.runs.trained import load_data
from crt_lib.study.arenas import best_try, find_arena
from crt_lib.text import lookup

if TYPE_CHECKING:
    from crt_lib.config import LanguageModel
    from crt_lib.study.trial import Row
    from crt_lib.text.tokenizer import TokenSplit

AT_ONCE = 250  # lines


def right_answers(model: "LanguageModel", split: "TokenSplit") -> list[dict[str, Any]]:
    """A row for each exit and number of look-ups: how many were `asked`, and the share `right`.

    Of each line's first question, where no earlier answer can save look-ups; `right_all` is of all
    questions. A line is read by itself, and an answer is right where its word is the likeliest.
    Raises InputError for a split that is not of whole lines of the language.
    """
    ids, columns, steps = lines_of(split)
    right: dict[int, list[np.ndarray]] = {}
    with torch.inference_mode(), evaluating(model):
        for first in range(0, len(ids), AT_ONCE):
            batch = torch.from_numpy(ids[first : first + AT_ONCE])
            for loop, logits in logits_of(model, batch).items():
                guess = logits[:, columns - 1].argmax(-1) == batch[:, columns]
                right.setdefault(loop, []).append(guess.numpy())
    rows = []
    for loop, parts in right.items():
        answered = np.concatenate(parts)
        for needed in np.unique(steps).tolist():
            first = answered[steps[:, 0] == needed, 0]
            row = {"exit": loop, "steps": needed, "asked": first.size, "right": first.mean()}
            rows.append(row | {"right_all": answered[steps == needed].mean()})
    return rows


def lines_of(split: "TokenSplit") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the lines (lines, LENGTH), the columns of their answers, and the look-ups of each."""
    if len(split.ids) % lookup.LENGTH:
        raise InputError(f"the text is not of lines of {lookup.LENGTH} words; use corpus 'lookup'")
    ids = split.ids.reshape(-1, lookup.LENGTH).astype(np.int64)
    words = [split.tokenizer.decode([i]) for i in range(split.tokenizer.vocab_size)]
    numbers = np.array([int(word) if word.isdigit() else 0 for word in words])
    columns, steps = lookup.questions(ids, numbers)
    return ids, columns, steps


def deeper(model: CRT, n_loops: int) -> CRT:
    """The model with `n_loops` loops, those after its last being like its last, and all exits.

    Raises InputError when it has as many or more.
    """
    last = model.config.n_loops
    if n_loops <= last:
        raise InputError(f"n_loops is {n_loops}; the model has {last}: give more")
    made = CRT(model.config.replace(n_loops=n_loops, exit_loops=tuple(range(1, n_loops))))
    own = model.state_dict()
    state = {}
    for name, value in made.state_dict().items():
        part, *rest = name.split(".")
        if part == "loop_encoding":
            value = own[name][torch.arange(n_loops).clamp(max=last - 1)]
        elif part == "exit_norms":
            value = own[".".join([part, str(min(int(rest[0]), last)), *rest[1:]])]
        else:
            value = own[name]
        state[name] = value
    made.load_state_dict(state)
    return made.eval()


def staircase(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """The shares right as a table, loops down, look-ups across; rows of `right_answers`."""
    loops, steps = (sorted({row[name] for row in rows}) for name in ("exit", "steps"))
    share = {(row["exit"], row["steps"]): row["right"] for row in rows}
    return np.array([[share[loop, needed] for needed in steps] for loop in loops])


def answers(folder: Path, name: str = "lookup") -> list["Row"]:
    """The rows of `folder`/`name`/answers.csv, which is made of the arena's trained models.

    `right_answers` of test by arm and seed; runs that are not there yet are added. Raises
    InputError for a run whose checkpoint is gone.
    """
    arena, own = find_arena(name), folder / name
    path = own / "answers.csv"
    rows = read_rows(path) if path.exists() else []
    scored = {(row["arm"], row["seed"]) for row in rows}
    best = {arm: best_try(own, arena, arm) for arm in arena.arms if _ran(own, arm)}
    waiting = [
        (arm, trial)
        for arm, trials in arena.runs(best).items()
        for trial in trials
        if trial.row(read_rows(own / "runs.csv")) and (arm, trial.profile.train.seed) not in scored
    ]
    if waiting:
        test = load_data(waiting[0][1].profile).test
        for arm, trial in waiting:
            path_of = RunFolder(trial.folder(own / "checkpoints")).checkpoint("last")
            labels = {"arm": arm, "seed": trial.profile.train.seed}
            rows += [labels | row for row in right_answers(load_model(path_of), test)]
        write_rows(path, rows)
    return rows


def _ran(own: Path, arm: str) -> bool:
    path = own / "runs.csv"
    return path.exists() and any(row["arm"] == arm for row in read_rows(path))
