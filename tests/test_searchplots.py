"""The search's charts show every row they are given."""

from matplotlib.figure import Figure

from crt_lib import searchplots

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
