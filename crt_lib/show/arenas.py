"""The arenas on a page: a table each of arms, their costs, and how far `crt2` is ahead."""

from pathlib import Path

import pandas as pd

from crt_lib.files import read_rows
from crt_lib.show.markdown import cells, table
from crt_lib.study.arenas import OURS, arenas, find_arena
from crt_lib.study.lookups import staircase
from crt_lib.study.standings import answers, standings


def arena_tables(results: Path) -> str:
    """A section for each arena that has run."""
    folder = results / "arenas"
    ran = [name for name in arenas() if (folder / name / "runs.csv").exists()]
    parts = []
    for name in ran:
        arena = find_arena(name)
        made = document_table(name, folder) if arena.documents else answer_table(name, folder)
        parts.append(f"### {name}\n\n{arena.question}\n\n{made}")
    return "\n\n".join(parts)


def _costs(frame: pd.DataFrame) -> dict[str, pd.Series]:
    return {
        "arm": frame["arm"],
        "parameters": cells(frame["parameters"] / 1e6, "{:.2f}M"),
        "multiply-adds": cells(frame["multiply_adds"] / 1e6, "{:.2f}M"),
        "tokens": cells(frame["tokens"] / 1e6, "{:.1f}M"),
        "minutes": cells(frame["seconds"] / 60, "{:.0f}"),
        "best of tries": frame["best"] + " of " + frame["tries"].astype(str),
        "seeds": frame["seeds"].astype(str),
    }


def document_table(name: str, folder: Path) -> str:
    """Bits per byte of test of every arm, and `crt2` minus it; then every exit of `crt2`."""
    frame = pd.DataFrame(standings(name, folder))
    ahead = [
        ""
        if pd.isna(row["mean"])
        else f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        for _, row in frame.iterrows()
    ]
    bits = {"test bits/byte": cells(frame["bits"], "{:.4f}"), f"`{OURS}` minus it": ahead}
    ours = [row for row in read_rows(folder / name / "runs.csv") if row["arm"] == OURS]
    exits = pd.DataFrame([dict(p.split(":") for p in row["test_bits"].split()) for row in ours])
    means = exits.astype(float).mean()
    steps = ", ".join(f"{worth:.3f}" for worth in -means.diff().iloc[1:])
    return (
        f"{table(pd.DataFrame(_costs(frame) | bits))}\n\nBelow zero `{OURS}` is better; in "
        f"brackets the 95 % interval. Its exits: {', '.join(map('{:.4f}'.format, means))}: each "
        f"further loop is worth {steps} bits per byte."
    )


def answer_table(name: str, folder: Path) -> str:
    """Right answers of every arm by the look-ups needed, and of `crt2` by loop too."""
    rows = pd.DataFrame(answers(folder, name))
    last = {arm: profile.model.n_loops for arm, profile in find_arena(name).arms.items()}
    at_last = rows[rows["loop"] == rows["arm"].map(last)]
    found = at_last.groupby(["arm", "steps"])["right"].agg(["mean", "min", "max"])
    costs = pd.DataFrame(standings(name, folder))
    columns = {}
    for needed, of in found.groupby("steps"):
        share = of.droplevel("steps").loc[costs["arm"]].map("{:.1%}".format)
        columns[f"right, {needed}"] = list(
            share["mean"] + " (" + share["min"] + " to " + share["max"] + ")"
        )
    ours = staircase(rows[rows["arm"] == OURS].to_dict("records"))
    by_loop = ours.map("{:.1%}".format).rename(columns=str).reset_index().rename_axis(None, axis=1)
    return (
        f"{table(pd.DataFrame(_costs(costs) | columns))}\n\nRight answers to the first question "
        f"of a line by the look-ups needed, at the last exit: mean and range of the seeds. Of "
        f"`{OURS}`, trained with {last[OURS]} loops, by loop and look-ups:\n\n{table(by_loop)}"
    )
