"""Distilled exits: what two teachers are worth to them, against the text and the model itself."""

from pathlib import Path

import pandas as pd

from crt_lib.files import read_rows
from crt_lib.study.sota import exits_of, finished_run

BEFORE = "as it was trained"
ARMS = {  # run below results -> what it learned from
    "distilled/text": "the text alone",
    "distilled/own_written": "its last exit, of what it writes",
    "demo": "two models, of what they write",
}


def distilled_ppl(results: Path) -> pd.DataFrame:
    """Word perplexity on test: a row an arm, BEFORE the first, a column an exit.

    Raises InputError where a run or the table of the model before is missing.
    """
    scores = {BEFORE: read_rows(results / "distilled" / "before_test.csv")}
    scores |= {said: finished_run(results / folder).results for folder, said in ARMS.items()}
    exits = {
        said: {row["exit"]: row["word_ppl"] for row in exits_of(rows, split="test")}
        for said, rows in scores.items()
    }
    return pd.DataFrame(exits).T.rename_axis(index="learns from", columns="exit")
