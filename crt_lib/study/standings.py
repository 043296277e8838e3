"""Where the arms of an arena stand: what each cost, how it was tuned, what it reached."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.audit.compare import difference_in_bits
from crt_lib.bench.table import rows_of
from crt_lib.files import read_rows
from crt_lib.study.arena_runs import TOKENS, best_try, ran
from crt_lib.study.arenas import OURS, Arena, find_arena, in_time_of
from crt_lib.study.search import documents_file
from crt_lib.study.trial import Row


def costs(arena: Arena, own: Path, arm: str, runs: list[Row]) -> Row:
    """What an arm has of parameters and does of multiply-adds, its tokens, tries and seconds.

    `multiply_adds`: a token's at use, with the last head alone. `ms`: of a token that it writes,
    None where that was not measured. `seconds`: the mean of its `runs`. `best`: the try that won;
    `edge`: a rate that has no try on one side, so that the arm may reach more.
    """
    best = best_try(own, arena, arm)
    profile = arena.shaped(arm, best)
    model, seq_len = profile.model, profile.train.seq_len
    return {
        "arm": arm,
        "parameters": sum(parameters_by_part(model).values()),
        "multiply_adds": sum(multiply_adds(model, seq_len, (model.n_loops,)).values()),
        "ms": next((row["ms"] for row in rows_of(own / TOKENS) if row["arm"] == arm), None),
        "tokens": runs[0]["tokens"],
        "tries": len(arena.tries),
        "best": best,
        "edge": not arena.shapes and list(arena.tries).index(best) in (0, len(arena.tries) - 1),
        "seeds": len(runs),
        "seconds": float(np.mean([row["seconds"] for row in runs])),
    }


def standings(name: str, folder: Path) -> list[Row]:
    """A row for each arm that has run, with its costs.

    Where test was scored by document: `bits`, bits per byte of test at the last exit, the mean of
    the seeds that ran, and the `mean` of OURS minus it with its 95 % interval, `low` and `high`
    (`difference_in_bits`), None where one has fewer than two seeds; `in_time`, the same of OURS
    with the updates that fit into the time of the arm, a dict or None.
    """
    arena, own, runs = find_arena(name), folder / name, ran(name, folder)
    table = [
        costs(arena, own, arm, [row for _, row in runs[arm]]) for arm in arena.arms if arm in runs
    ]
    if not arena.documents or not table:
        return table
    documents = pd.DataFrame(read_rows(documents_file(own / "runs.csv")))
    scored = dict(iter(documents.groupby(["arm", "settings", "seed"])))
    nats = {
        arm: [scored[arm, t.key["settings"], t.seed]["nll"].to_numpy() for t, _ in of]
        for arm, of in runs.items()
    }
    first = runs[table[0]["arm"]][0][0]
    sizes = scored[first.arm, first.key["settings"], first.seed]["bytes"].to_numpy()

    def minus(ours: str, arm: str) -> Row | None:
        both = (nats.get(ours, []), nats[arm])
        if arm == OURS or min(map(len, both)) < 2:
            return None
        found = difference_in_bits(*both, sizes)
        return {"mean": found.mean, "low": found.low, "high": found.high}

    for row in table:
        total = np.mean([nll.sum() for nll in nats[row["arm"]]])
        row["bits"] = float(total / math.log(2) / sizes.sum())
        row |= minus(OURS, row["arm"]) or dict.fromkeys(("mean", "low", "high"))
        row["in_time"] = minus(in_time_of(row["arm"]), row["arm"])
    return table
