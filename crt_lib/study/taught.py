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


def distilled_rows(results: Path) -> pd.DataFrame:
    """A row an arm and exit: nats a token on valid, word perplexity on test, its share above.

    `above_full`: of the word perplexity on test, against the last exit of the same model; `above`:
    against the last exit before distilling. Raises InputError where a run or table is missing.
    """
    scores = {
        BEFORE: [
            row
            for split in ("valid", "test")
            for row in read_rows(results / "distilled" / f"before_{split}.csv")
        ]
    } | {said: finished_run(results / folder).results for folder, said in ARMS.items()}
    rows = []
    for said, found in scores.items():
        valid, test = (exits_of(found, split=split) for split in ("valid", "test"))
        for on_valid, on_test in zip(valid, test, strict=True):
            ppl = on_test["word_ppl"]
            rows.append(
                {
                    "learned_from": said,
                    "exit": on_test["exit"],
                    "valid_loss": on_valid["loss"],
                    "word_ppl": ppl,
                    "bits_per_byte": on_test["bits_per_byte"],
                    "above_full": ppl / test[-1]["word_ppl"] - 1,
                }
            )
    made = pd.DataFrame(rows)
    full = made.query("learned_from == @BEFORE")["word_ppl"].iloc[-1]
    return made.assign(above=made["word_ppl"] / full - 1)
