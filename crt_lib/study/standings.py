"""Where the arms of an arena stand: what each cost, how it was tuned, what it reached."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.audit.compare import difference_in_bits
from crt_lib.checkpoint import RunFolder, load_model
from crt_lib.files import read_rows, write_rows
from crt_lib.runs.trained import load_data
from crt_lib.study.arenas import OURS, Arena, best_try, find_arena, ran
from crt_lib.study.lookups import FARTHER, right_answers
from crt_lib.study.search import documents_file

if TYPE_CHECKING:
    from crt_lib.study.trial import Row


def costs(arena: Arena, own: Path, arm: str, runs: list["Row"]) -> "Row":
    """What an arm has of parameters and does of multiply-adds, its tokens, tries and seconds.

    `multiply_adds`: a token's at use, with the last head alone. `seconds`: the mean of its `runs`.
    """
    profile = arena.arms[arm]
    model, seq_len = profile.model, profile.train.seq_len
    return {
        "arm": arm,
        "parameters": sum(parameters_by_part(model).values()),
        "multiply_adds": sum(multiply_adds(model, seq_len, (model.n_loops,)).values()),
        "tokens": runs[0]["tokens"],
        "tries": len(arena.tries),
        "best": best_try(own, arena, arm),
        "seeds": len(runs),
        "seconds": float(np.mean([row["seconds"] for row in runs])),
    }


def standings(name: str, folder: Path) -> list["Row"]:
    """A row for each arm that has run, with its costs.

    Where test was scored by document: `bits`, bits per byte of test at the last exit, the mean of
    the seeds that ran, and the `mean` of OURS minus it with its 95 % interval, `low` and `high`
    (`difference_in_bits`), None where one has fewer than two seeds.
    """
    arena, own = find_arena(name), folder / name
    files = own / "runs.csv", documents_file(own / "runs.csv")
    rows, documents = (read_rows(path) if path.exists() else [] for path in files)
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arena.arms}
    table = [costs(arena, own, arm, runs) for arm, runs in by_arm.items() if runs]
    if not arena.documents:
        return table
    nats: dict[str, list[np.ndarray]] = {}
    for row in table:
        of_seed = [
            [of for of in documents if (of["arm"], of["seed"]) == (row["arm"], run["seed"])]
            for run in by_arm[row["arm"]]
        ]
        nats[row["arm"]] = [np.array([of["nll"] for of in scored]) for scored in of_seed]
        sizes = np.array([of["bytes"] for of in of_seed[0]])
        total = np.mean([nll.sum() for nll in nats[row["arm"]]])
        both, found = (nats.get(OURS, []), nats[row["arm"]]), None
        if row["arm"] != OURS and min(map(len, both)) > 1:
            found = difference_in_bits(*both, sizes)
        row["bits"] = float(total / math.log(2) / sizes.sum())
        row |= {name: found and getattr(found, name) for name in ("mean", "low", "high")}
    return table


def answers(folder: Path, name: str = "lookup") -> list["Row"]:
    """The rows of `folder`/`name`/answers.csv, made of the arena's trained models.

    `right_answers` of test by arm and seed, a looped model's with FARTHER loops; runs that are not
    there yet are added, and none is scored twice. Raises InputError for a checkpoint that is gone.
    """
    path = folder / name / "answers.csv"
    rows = read_rows(path) if path.exists() else []
    scored = {(row["arm"], row["seed"]) for row in rows}
    waiting = [trial for trial in ran(name, folder) if (trial.arm, trial.seed) not in scored]
    for trial in waiting:
        test = load_data(trial.profile).test
        kept = RunFolder(trial.folder(folder / name / "checkpoints")).checkpoint("last")
        model, labels = load_model(kept), {"arm": trial.arm, "seed": trial.seed}
        loops = FARTHER if model.config.n_loops > 1 else None
        rows += [labels | row for row in right_answers(model, test, loops)]
    if waiting:
        write_rows(path, rows)
    return rows
