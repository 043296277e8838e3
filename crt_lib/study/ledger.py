"""The ledger of claims: its verdicts, and the measured files that they follow from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.files import read_rows
from crt_lib.runs.run import Run, load_run
from crt_lib.study.sota import exits_of

HOLDS, LEAK, FAILS = "holds", "holds only under the leak", "does not hold"
UNDERIVED, UNTESTED = "not derivable", "not tested"
LARGEST_FIRST = ("paper", "small")  # the smaller ones are made anew wherever the notebooks run
NEAR = 0.1  # of the paper's value: what counts as the same


@dataclass(frozen=True)
class Judged:
    """What was found: both protocols' values as text, the verdict, and where it comes from."""

    verdict: str
    why: str = ""
    released: str = ""
    honest: str = ""
    profile: str = ""
    seeds: int = 0


class Untested(Exception):
    """Nothing measures a claim; the message says why."""


def verdict(*held: bool) -> str:
    """That of what is so as released and honestly, or of what was only asked honestly."""
    return HOLDS if held[-1] else LEAK if held[0] else FAILS


def reaches(found: float, claimed: float) -> bool:
    """Whether a value that should be large is as large as claimed, less a tenth."""
    return found >= claimed * (1 - NEAR)


def table(results: Path, name: str, why: str) -> list[dict[str, Any]]:
    """The rows of a measured file; raises Untested, which says `why`, without it."""
    path = results / name
    if not path.is_file():
        raise Untested(why)
    return read_rows(path)


def scored_pair(results: Path) -> dict[str, Run]:
    """The released block and the same made causal, by the protocol that each is scored by.

    At the largest profile that has both; raises Untested where none has.
    """
    for profile in LARGEST_FIRST:
        released, paper = (load_run(results / profile / name) for name in ("released", "paper"))
        if released and paper:
            return {"released": released, "honest": paper}
    raise Untested("no profile has a finished run of both recipes, released and paper")


def judged_pair(pair: dict[str, Run], held: list[bool], why: str, said: list[str]) -> Judged:
    """What was found of them: whether it holds of each, and their values."""
    released, honest = said
    return Judged(verdict(*held), why, released, honest, pair["honest"].out.parent.name, 1)


def loss_of(run: Run, split: str, protocol: str, place: int) -> float:
    """Of the `place`-th exit (-1: the last), nats a position; raises Untested without it."""
    return _exit_row(run.results, place, protocol, split=split)["loss"]


def row_with_interval(run: Run, protocol: str, place: int) -> dict[str, Any] | None:
    """The row of an exit in the run's exits.csv, which is of valid; None where none was kept."""
    path = run.out / "exits.csv"
    row = _exit_row(read_rows(path), place, protocol) if path.is_file() else None
    return row if row and row["low"] is not None else None


def _exit_row(rows: list[dict[str, Any]], place: int, protocol: str, **kind: str) -> dict[str, Any]:
    own = exits_of(rows, protocol, **kind)
    if not -len(own) <= place < len(own):
        raise Untested("these runs have no such exit or protocol")
    return own[place]


def summary(rows: list[dict[str, Any]]) -> str:
    """How many claims have each verdict."""
    found = [row["verdict"] for row in rows]
    order = (HOLDS, LEAK, FAILS, UNDERIVED, UNTESTED)
    said = ", ".join(f"{kind}: {found.count(kind)}" for kind in order if kind in found)
    return f"Of the paper's {len(rows)} claims: {said}."
