"""A check of a reader's answer says right or not, and never what is right."""

import pytest

from crt_lib.book.exercise import check


def test_without_an_answer_nothing_is_computed():
    def costly():
        raise AssertionError("computed")

    assert check(None, costly, "a set of loops") == (
        "No answer yet: set `answer` to a set of loops, then run this cell again."
    )


@pytest.mark.parametrize(
    ("answer", "right", "tolerance", "said"),
    [
        ({2, 4}, {4, 2}, 0.0, "Right."),
        ({2}, {4, 2}, 0.0, "Not yet: {2} is not what comes out."),
        ({2: 14}, {2: 14}, 0.0, "Right."),
        (8, 8.0, 0.0, "Right."),
        (0.33, 0.34, 0.02, "Right."),
        (0.30, 0.34, 0.02, "Not yet: 0.3 is not what comes out."),
        (float("nan"), 0.34, 0.02, "Not yet: nan is not what comes out."),
        (0, 0, 0.0, "Right."),
        ("better", "worse", 0.0, "Not yet: 'better' is not what comes out."),
        ("8", 8, 0.0, "Not yet: '8' is not what comes out."),
    ],
)
def test_an_answer_is_right_or_not_yet(answer, right, tolerance, said):
    assert check(answer, lambda: right, "an answer", tolerance) == said
