"""How long a training must be for a loop to pay: the arena `lengths`, by depth and by length."""

from pathlib import Path

import numpy as np

from crt_lib.bench.table import rows_of
from crt_lib.study.arena_runs import PACE, ran
from crt_lib.study.arenas import BEGIN, DEPTHS, LATE, LENGTHS, OURS, in_time_of, length_arm
from crt_lib.study.search import exit_losses
from crt_lib.study.trial import Row

LONGER = "fresh-2"  # an arena with the same arms, trained for longer
OF_LONGER = {OURS: "4 loops", in_time_of("one loop"): "4 loops", "one loop": "1 loop"}


def by_length(folder: Path, name: str = "lengths") -> list[Row]:
    """A row a depth and length that has run: `bits` per byte of test, the mean of the seeds, with
    the `least` and `most` of them, and the `seconds` of its updates, measured side by side on one
    thread. The longest are runs of the arena LONGER.
    """
    if not (folder / name / PACE).exists():
        return []
    pace = {row["arm"]: row["median"] for row in rows_of(folder / name / PACE)}
    of_update = {depth: pace[length_arm(depth, LENGTHS[0])] for depth in DEPTHS if depth != LATE}
    one, four = of_update["1 loop"], of_update["4 loops"]
    of_update[LATE] = BEGIN * one + (1 - BEGIN) * four
    runs, longer, rows = ran(name, folder), ran(LONGER, folder), []
    arms = {(d, n): runs.get(length_arm(d, n), []) for d in DEPTHS for n in LENGTHS}
    for arm, depth in OF_LONGER.items():
        for trial, row in longer.get(arm, []):
            arms.setdefault((depth, row["updates"]), []).append((trial, row))
    for (depth, updates), of in arms.items():
        if not (found := [row for _, row in of]):
            continue
        exits = [exit_losses({"exit_losses": row["test_bits"]}) for row in found]
        last = [of[max(of)] for of in exits]
        row = {"depth": depth, "updates": updates, "seeds": len(last)}
        row |= {"seconds": updates * of_update[depth], "tokens": found[0]["tokens"]}
        rows.append(row | {"bits": float(np.mean(last)), "least": min(last), "most": max(last)})
    return rows
