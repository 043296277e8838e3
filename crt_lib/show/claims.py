"""The paper's claims as README has them."""

from pathlib import Path

import pandas as pd

from crt_lib.show.markdown import table
from crt_lib.study.claims import judge_claims, summary

HEADLINES = ["C01", "C06", "C08", "C12", "C20"]  # what the title and the abstract rest on


def claims_summary(results: Path) -> str:
    """The ledger's counts, and the rows that the paper's title and abstract rest on."""
    rows = judge_claims(results)
    shown = pd.DataFrame(rows).set_index("id").loc[HEADLINES]
    heads = {"paper": "claimed", "released": "as scored", "honest": "honestly"}
    return (
        f"{table(shown[['claim', *heads]].rename(columns=heads))}\n\n"
        f"{summary(rows)} All: [results/claims.md](results/claims.md).\n\n"
        f"The row of losses is of {shown['why']['C06']}."
    )
