"""The paper's claims as README has them."""

from pathlib import Path

from crt_lib.show.templates import render
from crt_lib.study.claims import judge_claims, summary

HEADLINES = ["C01", "C06", "C08", "C12", "C20"]  # what the title and the abstract rest on


def claims_summary(results: Path) -> str:
    """The ledger's counts, and the rows that the paper's title and abstract rest on."""
    rows = judge_claims(results)
    by_id = {row["id"]: row for row in rows}
    shown = [by_id[name] for name in HEADLINES]
    return render("claims", shown=shown, summary=summary(rows), losses=by_id["C06"])
