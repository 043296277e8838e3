"""What the trained models of an arena of look-ups answer, scored once and kept."""

from pathlib import Path

from crt_lib.bench.table import rows_of
from crt_lib.checkpoint import RunFolder, load_model
from crt_lib.files import InputError, locked, write_rows
from crt_lib.runs.trained import load_data
from crt_lib.study.arena_runs import ran
from crt_lib.study.lookups import FARTHER, right_answers
from crt_lib.study.trial import Row


def answers(folder: Path, name: str = "lookup") -> list[Row]:
    """The rows of `folder`/`name`/answers.csv of the arena's runs; `score_answers` makes them."""
    path = folder / name / "answers.csv"
    keys = {
        (arm, t.seed, t.key["settings"]) for arm, of in ran(name, folder).items() for t, _ in of
    }
    return [row for row in rows_of(path) if (row["arm"], row["seed"], row["settings"]) in keys]


def score_answers(folder: Path, name: str = "lookup") -> None:
    """Add to answers.csv what the trained models of an arena answer, where it is not there yet.

    `right_answers` of test, a looped model's with FARTHER loops. Raises InputError for a model that
    is gone.
    """
    path = folder / name / "answers.csv"
    with locked(path):
        rows = answers(folder, name)
        scored = {(row["arm"], row["seed"]) for row in rows}
        runs = [trial for of in ran(name, folder).values() for trial, _ in of]
        for trial in (trial for trial in runs if (trial.arm, trial.seed) not in scored):
            kept = RunFolder(trial.folder(folder / name / "checkpoints")).checkpoint("last")
            if not kept.exists():
                raise InputError(f"no {kept}; remove the arm's rows of runs.csv, and `crt arena`")
            model = load_model(kept)
            labels = {"arm": trial.arm, "seed": trial.seed, "settings": trial.key["settings"]}
            loops = FARTHER if model.config.n_loops > 1 else None
            test = load_data(trial.profile).test
            rows += [labels | row for row in right_answers(model, test, loops)]
        write_rows(path, rows)
