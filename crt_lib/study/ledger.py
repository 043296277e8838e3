"""The ledger of claims: its rows, the measured files that they are judged by, and its page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.files import read_rows
from crt_lib.runs.manifest import read_training

HOLDS, LEAK, FAILS = "holds", "holds only under the leak", "does not hold"
UNDERIVED, UNTESTED = "not derivable", "not tested"
LARGEST_FIRST = ("paper", "small")  # the smaller ones are made anew wherever the notebooks run
NEAR = 0.1  # of the paper's value: what counts as the same

COLUMNS = (
    *("id", "claim", "paper", "place", "released", "honest", "verdict", "why", "rule"),
    *("profile", "seeds", "command"),
)


@dataclass(frozen=True)
class Judged:
    """What was found: both protocols' values as text, the verdict, and where it comes from."""

    verdict: str
    why: str = ""
    released: str = ""
    honest: str = ""
    profile: str = ""
    seeds: int = 0
    command: str = ""


@dataclass(frozen=True)
class Claim:
    """A row of the ledger: what the paper says and where, and how it is judged."""

    id: str
    claim: str
    paper: str
    place: str
    rule: str
    judge: Callable[["Results"], Judged]


class Results:
    """The measured files; each answer comes from the largest profile that has it."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def run(self, profile: str, recipe: str) -> "RunRows | None":
        """The results of a finished run of `recipe` at `profile`."""
        path = self.root / profile / recipe / "results.csv"
        part = read_training(path.parent)
        if part is None or part["status"] != "done" or not path.is_file():
            return None
        exits = path.with_name("exits.csv")
        kept = read_rows(exits) if exits.is_file() else []
        return RunRows(profile, recipe, read_rows(path), kept)

    def pair(self) -> "tuple[RunRows, RunRows] | None":
        """The released block and the same made causal, at the largest profile that has both."""
        for profile in LARGEST_FIRST:
            released, paper = (self.run(profile, recipe) for recipe in ("released", "paper"))
            if released and paper:
                return released, paper
        return None

    def table(self, name: str) -> tuple[str, list[dict[str, Any]]] | None:
        """The profile and rows of `results/<profile>/<name>`."""
        for profile in LARGEST_FIRST:
            path = self.root / profile / name
            if path.is_file():
                return profile, read_rows(path)
        return None

    def bench(self, name: str) -> list[dict[str, Any]] | None:
        """The rows of `results/bench/<name>`."""
        path = self.root / "bench" / name
        return read_rows(path) if path.is_file() else None


@dataclass(frozen=True)
class RunRows:
    """results.csv of a run, and exits.csv, which has intervals, where it was kept."""

    profile: str
    recipe: str
    rows: list[dict[str, Any]]
    exits: list[dict[str, Any]]

    @property
    def command(self) -> str:
        """What made it."""
        return f"crt train --profile {self.profile} --recipe {self.recipe}"

    def loss(self, split: str, protocol: str, place: int) -> float | None:
        """Of the `place`-th exit (-1: the last), nats a position; None if it was not scored so."""
        found = [r for r in self.rows if (r["split"], r["protocol"]) == (split, protocol)]
        row = _placed(found, place)
        return row["loss"] if row else None

    def exit_row(self, protocol: str, place: int) -> dict[str, Any] | None:
        """The row of exits.csv (`crt_lib.audit.compare.exit_table`) of the `place`-th exit."""
        return _placed([row for row in self.exits if row["protocol"] == protocol], place)


def _placed(rows: list[dict[str, Any]], place: int) -> dict[str, Any] | None:
    rows = sorted(rows, key=lambda row: row["exit"])
    return rows[place] if -len(rows) <= place < len(rows) else None


def render_claims(rows: list[dict[str, Any]]) -> str:
    """The ledger as a page."""
    lines = ["# The paper's claims, held against measurements", "", summary(rows), ""]
    lines += [
        "Made by `crt claims` from the files beside it. `released`: as the paper scored, with a "
        "model that sees later tokens. `honest`: causal, every token of the text scored once. In "
        "brackets 95 % intervals, over documents and, of several seeds, over seeds; a value "
        "without them was measured once, or is a count. The two runs at `small` have four loops, "
        "so the paper's loops 2, 4, 6 and 8 are their exits 1 to 4; the released one also has "
        "separate heads and lines of 384 tokens, the causal one tied heads and windows of 256.",
        "",
        "| id | claim | paper | released | honest | verdict | profile, seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row[name] for name in ("id", "claim", "paper", "released", "honest", "verdict")]
        cells.append(f"{row['profile']}, {row['seeds']}" if row["seeds"] else row["profile"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Rules, reasons, commands", ""]
    for row in rows:
        parts = [f"**{row['id']}** ({row['place']}): {row['why']}."]
        parts += [f"Rule: {row['rule']}."] if row["rule"] else []
        parts += [f"`{row['command']}`"] if row["command"] else []
        lines.append("- " + " ".join(parts))
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many claims have each verdict."""
    order = (HOLDS, LEAK, FAILS, UNDERIVED, UNTESTED)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in order}
    said = ", ".join(f"{verdict}: {count}" for verdict, count in counts.items() if count)
    return f"Of the paper's {len(rows)} claims: {said}."
