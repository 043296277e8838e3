"""The search's charts show every row they are given."""

import math

from matplotlib.figure import Figure

from crt_lib.show import searchplots

ROWS = [
    {"arm": "paper", "loss": 6.0, "low": 5.95, "high": 6.05},
    {"arm": "+ pre-norm", "loss": 5.5, "low": 5.5, "high": 5.5},
    {"arm": "+ muon", "loss": 4.8, "low": 4.79, "high": 4.81},
]


def texts(figure: Figure) -> list[str]:
    """Every tick label and annotation of a figure."""
    figure.draw_without_rendering()
    labels = [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    return labels + [text.get_text() for ax in figure.axes for text in ax.texts]


def test_ladder():
    figure = searchplots.ladder({"equal tokens": ROWS, "equal time": ROWS[::2]})
    assert [p[1] for p in figure.axes[1].collections[-1].get_offsets().tolist()] == [0, 2]
    assert [ax.get_title("left") for ax in figure.axes] == ["equal tokens", "equal time"]
    assert {"paper", "+ muon", "6.000", "4.800"} <= set(texts(figure))


def test_differences_are_sorted_and_signed():
    figure = searchplots.differences(ROWS, ROWS[1])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "+ muon",
        "+ pre-norm",
        "paper",
    ]
    assert {"-0.700", "+0.500"} <= set(texts(figure))


def test_depth():
    lines = {"300 updates": {1: 4.9, 2: 4.8}, "1500 updates": {1: 4.3, 2: 4.2}}
    figure = searchplots.depth(lines, {"300 updates": 4.75})
    assert len(figure.axes) == 2
    assert {"4.900", "4.200"} <= set(texts(figure))
    assert figure.axes[0].get_legend() and not figure.axes[1].get_legend()


def test_race():
    metrics = [{"update": i, "loss": 5.0, "loss_9": 6.0, "loss_12": 4.0 - i} for i in range(3)]
    short = {"update": 3, "loss": 5.0, "loss_9": 1.0}  # an update that did not run all loops
    figure = searchplots.race({"paper": metrics, "crt2": [*metrics, short, {"valid_loss_12": 1.0}]})
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[4.0, 3.0, 2.0]] * 2


def test_what_changes_are_worth():
    rows = [
        {"arm": "crt2", "loss": 5.0},
        {"arm": "crt2, rms norm", "loss": 4.9, "adds": -0.1, "low": -0.2, "high": -0.05},
        {"arm": "crt2, no norm", "loss": math.inf, "adds": math.inf, "low": 0.0, "high": 0.0},
        {"arm": "crt2, kernel 5", "loss": 5.01, "adds": 0.01, "low": -0.02, "high": 0.04},
    ]
    figure = searchplots.worth({"crt2": rows})
    shown = texts(figure)
    assert {"rms norm", "-0.100", "kernel 5", "+0.010"} <= set(shown) and "no norm" not in shown


def test_with_and_without_the_leak():
    row = {"paper": 1.9, "symmetric": 4.7, "deployable": 7.3, "causal": 6.9, "crt2": 5.5}
    figure = searchplots.with_and_without({"conv": row, "depthwise_mlp": row | {"paper": None}})
    first, second = figure.axes[0].lines
    assert first.get_ydata().tolist() == [1.9, 4.7, 7.3, 6.9, 5.5]
    assert math.isnan(second.get_ydata()[0])


def test_quality_against_cost():
    rows = [
        {"model": "crt2", "parameters": 1.5e6, "multiply_adds": 2.8e6, "bits_per_byte": 1.5},
        {"model": "GPT-2", "parameters": 2.4e6, "multiply_adds": 2.7e6, "bits_per_byte": 1.6},
    ]
    figure = searchplots.quality(rows, {"crt2": {1: 1.6, 2: 1.5}})
    assert {"1", "2"} <= set(texts(figure))
    left, middle, right = figure.axes
    assert left.collections[0].get_offsets().tolist() == [[1.5, 1.5]]
    assert middle.collections[1].get_offsets().tolist() == [[2.7, 1.6]]
    assert right.lines[0].get_xydata().tolist() == [[1, 1.6], [2, 1.5]]


def test_attempts_against_the_published():
    figure = searchplots.attempts({"plain": [(0.5, 300.0), (1.0, 200.0)]}, 65.8)
    (ax,) = figure.axes
    assert ax.lines[0].get_xydata().tolist() == [[0.5, 300.0], [1.0, 200.0]]
    assert ax.lines[1].get_ydata()[0] == 65.8


def test_scorings_tell_who_sees_the_token():
    rows = [
        {"name": "leaks", "ppl": 1.025, "sees": True},
        {"name": "alone", "ppl": 16226.4, "sees": False},
    ]
    figure = searchplots.scorings(rows)
    assert {"leaks", "alone", "1.025", "16,226"} <= set(texts(figure))
    bars = figure.axes[0].patches
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
