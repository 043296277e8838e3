"""Tables in Markdown: columns of numbers as cells, frames of cells as text."""

import pandas as pd


def cells(numbers: pd.Series, form: str) -> pd.Series:
    """Each number as `form` says it, nothing where there is none."""
    return numbers.map(form.format, na_action="ignore").fillna("")


def table(frame: pd.DataFrame) -> str:
    """A frame as Markdown, empty where it has no value; its index is left out."""
    rows = [list(frame), ["---"] * frame.shape[1], *frame.fillna("").astype(str).to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
