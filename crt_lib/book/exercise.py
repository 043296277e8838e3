"""The exercises of the notebooks: whether a reader's answer is right, without telling it."""

import math
from collections.abc import Callable
from typing import Any


def check(answer: Any, right: Callable[[], Any], wanted: str, tolerance: float = 0.0) -> str:
    """A sentence on `answer`: none yet, right, or not yet right.

    `right()` makes the right answer, and is called only where one is given: it may train a model.
    `wanted` says what an answer looks like. Numbers may differ by `tolerance`, absolute.
    """
    if answer is None:
        return f"No answer yet: set `answer` to {wanted}, then run this cell again."
    expected = right()
    agrees = bool(answer == expected)
    if isinstance(answer, int | float) and isinstance(expected, int | float):
        agrees = math.isclose(answer, expected, rel_tol=0.0, abs_tol=tolerance)
    return "Right." if agrees else f"Not yet: {answer!r} is not what comes out."
