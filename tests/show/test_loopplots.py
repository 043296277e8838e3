"""The charts of the loops show every row, exit and policy that they are given."""

import pytest
from matplotlib.figure import Figure

from crt_lib.exits import perloop
from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.exits.trace import apply_policy
from crt_lib.show import loopplots


def texts(figure: Figure) -> list[str]:
    """Every tick label, annotation and title of a figure."""
    figure.draw_without_rendering()
    shown = [text.get_text() for ax in figure.axes for text in (*ax.texts, *ax.get_xticklabels())]
    shown += [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    return shown + [ax.get_title("left") for ax in figure.axes]


def test_losses_have_their_intervals(scored):
    rows = perloop.exit_losses(scored[2])
    left, right = loopplots.losses_by_exit(rows).axes
    assert len(left.containers) == len(rows) and len(right.containers) == len(rows) - 1


def test_shares_of_a_policy_fill_its_bar(scored):
    trace = scored[2]
    outcomes = {name: apply_policy(trace, Policy(name, 0.5, 0.5, 1.0)) for name in CRITERIA}
    (ax,) = loopplots.exit_shares(outcomes, trace.loops).axes
    ends = [bar.get_x() + bar.get_width() for bar in ax.containers[-1]]
    assert ends == pytest.approx([1.0] * len(outcomes))


def test_speeds_have_a_panel_a_batch_size():
    row = {"way": "full depth", "batch": 1, "speedup": 1.0, "tokens_per_second": 200.0}
    rows = [row, row | {"way": "exit 1", "speedup": 2.5, "tokens_per_second": 500.0}]
    figure = loopplots.speeds([*rows, row | {"batch": 8}])
    assert [len(ax.patches) for ax in figure.axes] == [2, 1]
    assert {"2.50x", "exit 1", "8 at a time"} <= set(texts(figure))


def test_the_explorers_picture_marks_the_policy(scored):
    trace = scored[2]
    curves = {name: perloop.frontier(trace, name) for name in CRITERIA}
    outcome = apply_policy(trace, Policy(fixed=1))
    figure = loopplots.exit_view(trace.loops, curves, outcome, None)
    (point,) = figure.axes[0].collections[-1].get_offsets().tolist()
    assert point == pytest.approx([outcome.multiply_adds / 1e6, outcome.token_ppl])
    assert "100%" in texts(figure)
    (ax,) = loopplots.frontiers(curves, {"exit 1": outcome}).axes
    assert len(ax.lines) == len(CRITERIA) + 1 and "exit 1" in texts(ax.figure)
