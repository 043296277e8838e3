"""The arenas on a page: a table each of arms, their costs, and how far `crt2` is ahead."""

from pathlib import Path

import pandas as pd

from crt_lib.files import read_rows
from crt_lib.show.markdown import cells, table
from crt_lib.study.arenas import OURS, arenas, find_arena
from crt_lib.study.lookups import answers
from crt_lib.study.standings import standings


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
    """Right answers of every arm by the look-ups needed, and of `crt2` by exit too."""
    rows = pd.DataFrame(answers(folder, name))
    means = rows.groupby(["arm", "exit", "steps"])["right"].agg(["mean", "min", "max"])
    costs = pd.DataFrame(standings(name, folder))
    last = {arm: means.loc[arm].index.get_level_values("exit").max() for arm in costs["arm"]}
    columns = {
        f"{needed} look-ups": [
            f"{of['mean']:.1%} ({of['min']:.1%} to {of['max']:.1%})"
            for of in (means.loc[arm, last[arm], needed] for arm in costs["arm"])
        ]
        for needed in sorted(rows["steps"].unique())
    }
    ours = means.loc[OURS]["mean"].unstack("steps")
    by_exit = pd.DataFrame({f"{needed}": cells(ours[needed], "{:.1%}") for needed in ours})
    by_exit.insert(0, "loop", ours.index.astype(str))
    return (
        f"{table(pd.DataFrame(_costs(costs) | columns))}\n\nRight answers to the first question "
        f"of a line at the last exit: mean and range of the seeds. `{OURS}` by loop and look-ups "
        f"needed:\n\n{table(by_exit)}"
    )
