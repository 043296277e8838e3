"""The arenas on a page: a table each of arms, their costs, and how far `crt2` is ahead."""

from pathlib import Path
from typing import Any

import pandas as pd

from crt_lib.bench.table import rows_of
from crt_lib.files import InputError
from crt_lib.show.markdown import cells, table
from crt_lib.study.answers import answers
from crt_lib.study.arena_runs import ran
from crt_lib.study.arenas import OURS, TWIN, arenas, find_arena
from crt_lib.study.standings import standings

BAR = 0.03  # bits per byte that the loops have to be worth over one, by results/arenas/rules.md


def looping_headline(results: Path) -> str:
    """What looping is good for, by the arenas; raises InputError where an arm has not run.

    A comparison says its seeds and, with two of them, its interval; its words follow its sign.
    """
    folder = results / "arenas"
    ours, one, own = _arms("fresh-2", folder, OURS, "one loop", "unshared blocks")
    _, plain = _arms("fresh", folder, OURS, "GPT-2, equal parameters")
    little, twin = _arms("few-4m", folder, OURS, TWIN)
    loops = f"{find_arena('fresh-2').arms[OURS].model.n_loops} loops"
    pays = "nothing" if not one["mean"] or one["high"] >= 0 else "little"
    pays = "something" if pays == "little" and one["mean"] <= -BAR else pays
    better = plain["mean"] is not None and plain["high"] < 0
    apart = " That is the block, not its repetition." if better and pays == "nothing" else ""
    ppl = word_perplexity(pd.Series([little["bits"], twin["bits"]]), results)
    noise = twin["mean"] is not None and twin["low"] < 0 < twin["high"]
    hardest, right = _hardest(folder)
    shares = [f"{right[arm]:.0%}" for arm in (OURS, "one loop", "unshared blocks")]
    dear = ours["multiply_adds"] / one["multiply_adds"]
    against_one, against_own = _against(f"{loops} need", one), _against("They need", own)
    return (
        "**What looping is good for**, by [rules](results/arenas/rules.md) written before the "
        f"runs: on text read once, at this size, so far {pays}. There {against_one} than one loop, "
        f"and {dear:.1f} times its multiply-adds. {against_own} than layers of their own.\n\n"
        f"With rates chosen on shorter trainings, {_against('`crt2` needs', plain)} than a GPT-2 "
        f"of as many parameters.{apart} "
        f"Read many times, WikiText-2 gives `crt2` with {little['parameters'] / 1e6:.1f}M "
        f"parameters a word perplexity of {ppl[0]:.0f}. A GPT-2 of {twin['parameters'] / 1e6:.1f}M "
        f"has {ppl[1]:.0f}{', which is within the noise' if noise else ''}. Of questions with "
        f"{hardest} look-ups in a row {loops} answer {shares[0]}, one loop {shares[1]}, layers of "
        f"their own {shares[2]} ([notebook 10](notebooks/10_where_loops_pay.ipynb))."
    )


def _arms(name: str, folder: Path, *arms: str) -> list[dict[str, Any]]:
    """The rows of `standings` of these arms, OURS among them, beside it: `apart` and `both`.

    `apart`: the bits of OURS minus those of the arm. `both`: the seeds that both have.
    """
    rows = {row["arm"]: row for row in standings(name, folder)}
    if lacking := [arm for arm in arms if arm not in rows]:
        raise InputError(f"{folder / name} has no run of {', '.join(lacking)}: crt arena {name}")
    ours = rows[OURS]
    for row in rows.values():
        row["apart"] = ours["bits"] - row["bits"]
        row["both"] = min(ours["seeds"], row["seeds"])
    return [rows[arm] for arm in arms]


def _against(said: str, row: dict[str, Any]) -> str:
    """How many bits per byte more or fewer OURS needs than an arm, a row of `_arms`, in words."""
    if row["mean"] is None:
        more, sure = row["apart"], "one seed"
    else:
        more, sure = row["mean"], f"{row['low']:+.3f} to {row['high']:+.3f}, {row['both']} seeds"
        if row["low"] <= 0 <= row["high"]:
            sure = f"{sure}: within the noise"
    word = "more" if more > 0 else "fewer"
    return f"{said} {abs(more):.3f} bits per byte {word} ({sure})"


def _hardest(folder: Path) -> tuple[int, dict[str, float]]:
    """The most look-ups that are asked for, and the share that each arm then answers right."""
    arms, rows = find_arena("lookup").arms, pd.DataFrame(answers(folder))
    last = rows["arm"].map({arm: profile.model.n_loops for arm, profile in arms.items()})
    asked = rows[(rows["loop"] == last) & (rows["steps"] == rows["steps"].max())]
    return int(rows["steps"].max()), asked.groupby("arm")["right"].mean().to_dict()


def arena_tables(results: Path) -> str:
    """A section for each arena that has something to show."""
    folder = results / "arenas"
    parts = []
    for name, arena in arenas().items():
        if not (folder / name / "runs.csv").exists():
            continue
        made = answer_table if name == "lookup" else document_table
        if text := made(name, folder):
            parts.append(f"### {name}\n\n{arena.question}\n\n{text}")
        if name == "fresh-2":
            parts.append(f"The loss on valid (nats per token) by rate:\n\n{rate_table(folder)}")
    return "\n\n".join(parts)


def _costs(frame: pd.DataFrame) -> dict[str, pd.Series]:
    edge = frame["edge"].map({True: ", at the edge", False: ""})
    return {
        "arm": frame["arm"],
        "parameters": cells(frame["parameters"] / 1e6, "{:.2f}M"),
        "multiply-adds": cells(frame["multiply_adds"] / 1e6, "{:.2f}M"),
        "tokens": cells(frame["tokens"] / 1e6, "{:.1f}M"),
        "minutes": cells(frame["seconds"] / 60, "{:.0f}"),
        "best of tries": frame["best"] + " of " + frame["tries"].astype(str) + edge,
    }


def _interval(of: dict[str, float | None]) -> str:
    if of.get("mean") is None:
        return ""
    return f"{of['mean']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"


def document_table(name: str, folder: Path) -> str:
    """Bits per byte of test of every arm, and `crt2` minus it; then every exit of `crt2`.

    Nothing where no arm has run, as in the other tables.
    """
    rows, runs = standings(name, folder), ran(name, folder)
    if not rows:
        return ""
    frame = pd.DataFrame(rows)
    columns = _costs(frame) | {
        "seeds": frame["seeds"].astype(str),
        "test bits/byte": cells(frame["bits"], "{:.4f}"),
        f"`{OURS}` minus it": list(map(_interval, rows)),
    }
    if any(row["in_time"] for row in rows):
        columns["in its time"] = [_interval(row["in_time"] or {}) for row in rows]
    arena = find_arena(name)
    if arena.arms[OURS].corpus == "wikitext-2":
        columns["test word PPL"] = cells(word_perplexity(frame["bits"], folder.parent), "{:.1f}")
    if "device" in (first := runs[rows[0]["arm"]][0][1]) and first["device"] != "cpu":
        columns.pop("minutes")  # of a device that others shared
    exits = _by_exit(name, folder) if OURS in runs else ""
    return f"{table(pd.DataFrame(columns))}\n\n{_legend(columns)} {exits}".rstrip()


def word_perplexity(bits: pd.Series, results: Path) -> pd.Series:
    """Of WikiText-2's test text: exp(total nats / words), from bits per byte."""
    (text,) = rows_of(
        results / "small/data.csv", corpus="wikitext-2", tokenizer="gpt2", split="test"
    )
    return 2 ** (bits * (text["bytes"] / text["words"]))


def _legend(columns: dict[str, Any]) -> str:
    said = [f"Below zero `{OURS}` is better; in brackets the 95 % interval."]
    if "in its time" in columns:
        said.append(
            f"In its time: `{OURS}` with as many updates as one processor thread makes in the time "
            "of the arm's training."
        )
    return " ".join(said)


def _by_exit(name: str, folder: Path) -> str:
    ours = [row for _, row in ran(name, folder)[OURS]]
    exits = pd.DataFrame([dict(p.split(":") for p in row["test_bits"].split()) for row in ours])
    means = exits.astype(float).mean()
    steps = ", ".join(f"{worth:.3f}" for worth in -means.diff().iloc[1:])
    return f"Its exits: {', '.join(map('{:.4f}'.format, means))}; a further loop is worth {steps}."


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
    frame = pd.DataFrame(
        {
            f"{updates:,} updates, rate {rate:g}": found[updates, rate]
            for updates, rate in sorted(found)
        }
    ).loc[list(find_arena(whole).arms)]
    shown = {column: cells(frame[column], "{:.3f}") for column in frame}
    return table(pd.DataFrame({"arm": frame.index, **shown}))


def answer_table(name: str, folder: Path) -> str:
    """Right answers of every arm at its last exit, seed by seed, by the look-ups needed."""
    arms, rows = find_arena(name).arms, pd.DataFrame(answers(folder, name))
    last = rows["arm"].map({arm: profile.model.n_loops for arm, profile in arms.items()})
    found = rows[rows["loop"] == last].set_index(["arm", "steps", "seed"])["right"].sort_index()
    costs = pd.DataFrame(standings(name, folder))
    columns = {}
    for needed in sorted(rows["steps"].unique()):
        shares = [100 * found.loc[arm, needed] for arm in costs["arm"]]
        columns[f"{needed} look-ups"] = [" / ".join(map("{:.0f}".format, of)) for of in shares]
    return (
        f"{table(pd.DataFrame(_costs(costs) | columns))}\n\nPercent of right answers to the first "
        f"question of a line, by the look-ups it asks for, at the last exit: seeds "
        f"{' / '.join(map(str, sorted(rows['seed'].unique())))}. Minutes are of a thread, others "
        "running. At the edge: no rate beyond the best was tried."
    )
