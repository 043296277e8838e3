"""The arenas on a page: a table each of arms, their costs, and how far `crt2` is ahead."""

from pathlib import Path
from typing import Any

import pandas as pd

from crt_lib.bench.table import rows_of
from crt_lib.files import InputError
from crt_lib.show.templates import render
from crt_lib.study.answers import answers
from crt_lib.study.arena_runs import ran
from crt_lib.study.arenas import OURS, TWIN, arenas, find_arena
from crt_lib.study.standings import standings

SMALL = "GPT-2, equal parameters"
BAR = 0.03  # bits per byte that the loops have to be worth over one, by results/arenas/rules.md


def looping_headline(results: Path) -> str:
    """What looping is good for, by the arenas; raises InputError where an arm has not run.

    A comparison says its seeds and, with two of them, its interval; its words follow its sign.
    """
    folder = results / "arenas"
    ours, one, own = _arms("fresh-2", folder, OURS, "one loop", "unshared blocks")
    fresh, plain, deep, wide = _arms("fresh", folder, OURS, SMALL, TWIN, "one wide loop")
    little, twin = _arms("few-4m", folder, OURS, TWIN)
    small, small_one = _arms("bytes-2", folder, OURS, "one loop")
    whole = pd.DataFrame(rows_of(folder / "bytes-2-time" / "tuning.csv"))
    as_long = whole.groupby("arm")["valid_loss"].min()
    pays = "nothing" if not one["mean"] or one["high"] >= 0 else "little"
    pays = "something" if pays == "little" and one["mean"] <= -BAR else pays
    right = _right(answers(folder), "lookup")
    hardest = max(right.index.unique("steps"))
    _arms("lookup-2", folder, OURS, "one loop", SMALL)  # or an error
    longer = _right(answers(folder, "lookup-2"), "lookup-2").xs(hardest, level="steps")
    return render(
        "looping",
        ours=ours,
        one=one,
        own=own,
        fresh=fresh,
        plain=plain,
        deep=deep,
        wide=wide,
        little=little,
        twin=twin,
        small=small,
        small_one=small_one,
        ahead=as_long[OURS] - as_long["one loop"],
        pays=pays,
        loops=find_arena("fresh-2").arms[OURS].model.n_loops,
        ppl=word_perplexity(pd.Series([little["bits"], twin["bits"]]), results),
        hardest=hardest,
        right=right.xs(hardest, level="steps"),
        longer=longer,
    )


def _arms(name: str, folder: Path, *arms: str) -> list[dict[str, Any]]:
    """The rows of `standings` of these arms; raises InputError where one has not run."""
    rows = {row["arm"]: row for row in standings(name, folder)}
    if lacking := [arm for arm in arms if arm not in rows]:
        raise InputError(f"{folder / name} has no run of {', '.join(lacking)}: crt arena {name}")
    return [rows[arm] for arm in arms]


def _right(rows: list[dict[str, Any]], name: str) -> "pd.Series[float]":
    """The share of right answers at an arm's last exit, by arm, look-ups needed and seed."""
    of_arm = {arm: profile.model.n_loops for arm, profile in find_arena(name).arms.items()}
    last = [row for row in rows if row["loop"] == of_arm[row["arm"]]]
    return pd.DataFrame(last).set_index(["arm", "steps", "seed"])["right"].sort_index()


def arena_tables(results: Path) -> str:
    """A section for each arena that has something to show."""
    folder, shown = results / "arenas", []
    for name, arena in arenas().items():
        if not (folder / name / "runs.csv").exists():
            continue
        made = document_table if arena.documents else answer_table
        if text := made(name, folder):
            rates = rate_table(folder) if name == "fresh-2" else ""
            about = {"name": name, "question": arena.question}
            shown.append(about | {"table": text, "rates": rates})
    return render("arenas", shown=shown)


def document_table(name: str, folder: Path) -> str:
    """Bits per byte of test of every arm, and `crt2` minus it; then every exit of `crt2`.

    Nothing where no arm has run, as in the other tables.
    """
    rows, runs = standings(name, folder), ran(name, folder)
    if not rows:
        return ""
    ours = [dict(p.split(":") for p in row["test_bits"].split()) for _, row in runs[OURS]]
    read = find_arena(name).arms[OURS].corpus == "wikitext-2"
    return render(
        "arena",
        rows=rows,
        # else of a device that others shared
        minutes=runs[rows[0]["arm"]][0][1].get("device", "cpu") == "cpu",
        ppl=word_perplexity(pd.DataFrame(rows)["bits"], folder.parent) if read else None,
        exits=pd.DataFrame(ours).astype(float).mean(),
    )


def word_perplexity(bits: pd.Series, results: Path) -> pd.Series:
    """Of WikiText-2's test text: exp(total nats / words), from bits per byte."""
    (text,) = rows_of(
        results / "small/data.csv", corpus="wikitext-2", tokenizer="gpt2", split="test"
    )
    return 2 ** (bits * (text["bytes"] / text["words"]))


def rate_table(folder: Path, short: str = "fresh", whole: str = "fresh-2") -> str:
    """The loss on valid of every arm at two rates, on a short training and on a whole one."""
    found: dict[tuple[int, float], dict[str, float]] = {}
    rates = [settings["max_lr"] for settings in find_arena(whole).tries.values()]
    for name in (short, whole):
        rows = rows_of(folder / name / "tuning.csv")
        for arm, trials in find_arena(name).tuning().items():
            for row in filter(None, (trial.row(rows) for trial in trials)):
                if row["max_lr"] in rates:
                    found.setdefault((row["updates"], row["max_lr"]), {})[arm] = row["valid_loss"]
    return render("rates", found=dict(sorted(found.items())), arms=find_arena(whole).arms)


def answer_table(name: str, folder: Path) -> str:
    """Right answers of every arm at its last exit, seed by seed, by the look-ups needed."""
    if not (found := answers(folder, name)):
        return ""
    right = _right(found, name)
    scored = [row for row in standings(name, folder) if row["arm"] in right.index]
    return render("answers", rows=scored, right=right)
