"""The charts show every value that they are given, and are files worth committing."""

import io
import itertools

import pandas as pd
import pytest
from drawn import texts
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from crt_lib.audit.compare import Interval
from crt_lib.files import InputError
from crt_lib.show import plots
from crt_lib.show.comparisons import name_points


def test_a_saved_figure_is_small_and_the_same_twice(tmp_path):
    def draw():
        return plots.bars({"": {"one": 1.0}}, "nats", "{:.2f}")

    figure = draw()
    shown = plots.save_figure(figure, tmp_path, "bars")
    path = tmp_path / "figures" / "bars.png"
    assert shown._repr_png_() == path.read_bytes()
    with_all_colours = io.BytesIO()
    figure.savefig(with_all_colours, format="png", dpi=figure.dpi)
    assert len(path.read_bytes()) < len(with_all_colours.getvalue()) / 2
    full, few = (imread(io.BytesIO(b))[..., :3] for b in (with_all_colours.getvalue(), shown.png))
    assert abs(full - few).max() < 0.15
    first, modified = path.read_bytes(), path.stat().st_mtime_ns
    plots.save_figure(draw(), tmp_path, "bars")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (first, modified)
    assert [p.name for p in path.parent.iterdir()] == ["bars.png"]
    assert figure.dpi <= 150 and imread(path).shape[1] <= 1100


def test_a_later_loop_is_darker():
    light = [sum(to_rgb(plots.loop_color(loop))) for loop in range(1, 9)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 8
    assert plots.loop_color(12) == plots.loop_color(8)
    for one, next_one in itertools.pairwise(map(plots.loop_look, range(1, 9))):  # in grey too
        assert one["linestyle"] != next_one["linestyle"] and one["marker"] != next_one["marker"]
    assert all(a - b > 0.15 for a, b in itertools.pairwise(light[:4]))


def test_exits_have_their_values_intervals_and_the_model_of_one_loop():
    charts = {"short": {1: 4.9, 2: 4.8}, "long": {1: Interval(4.3, 4.2, 4.5)}}
    figure = plots.by_exit(charts, "nats", {"short": 4.75, "long": 4.6})
    assert {"short", "long", "4.900", "4.800", "4.300", "a model of one loop"} <= texts(figure)
    left, right = figure.axes
    assert left.lines[0].get_ydata()[0] == 4.75 and list(left.get_xticks()) == [1, 2]
    (span,) = right.collections[0].get_segments()
    assert span[:, 1].tolist() == [4.2, 4.5]


def test_dots_stand_at_their_values_in_the_order_given():
    figure = plots.dots({"equal tokens": {"paper": 6.0, "+ muon": 4.8}}, "nats")
    (ax,) = figure.axes
    assert ax.collections[-1].get_offsets().tolist() == [[6.0, 0], [4.8, 1]]
    assert {"paper", "+ muon", "6.000", "4.800", "equal tokens"} <= texts(figure)


def test_a_difference_is_coloured_where_its_interval_is_off_zero():
    values = {
        "better": Interval(-0.2, -0.3, -0.1),
        "worse": Interval(0.2, 0.1, 0.3),
        "unsure": Interval(0.1, -0.1, 0.3),
        "one seed": 0.4,
    }
    figure = plots.dots({"": values}, "nats", signed=True)
    colors = figure.axes[0].collections[-1].get_facecolors()[:, :3].tolist()
    expected = (plots.BLUE, plots.VERMILION, plots.GREY, plots.GREY)
    assert colors == [list(to_rgb(color)) for color in expected]
    assert {"-0.200", "+0.400"} <= texts(figure)


def test_bars_of_a_panel_stand_in_the_rows_of_all():
    charts = {"1 at a time": {"full": 1.0, "exit 1": 2.5}, "8 at a time": {"exit 1": 3.0}}
    figure = plots.bars(charts, "speed", "{:.2f}x", mark=1)
    widths = [{bar.get_y(): bar.get_width() for bar in ax.patches} for ax in figure.axes]
    assert list(widths[0].values()) == [1.0, 2.5] and widths[1].keys() < widths[0].keys()
    assert {"2.50x", "3.00x", "exit 1", "8 at a time"} <= texts(figure)


def test_parts_of_a_bar_end_at_its_whole():
    shares = {"early": {1: 0.75, 2: 0.25}, "late": {2: 1.0}}
    figure = plots.stacked(shares, {1: plots.SKY, 2: plots.BLUE, 3: plots.BLACK}, "share", "{:.0%}")
    first, second = figure.axes[0].containers  # the third has no part
    assert [bar.get_width() for bar in first] == [0.75, 0.0]
    assert [bar.get_x() + bar.get_width() for bar in second] == [1.0, 1.0]
    assert "100%" in texts(figure)


def test_names_of_points_cover_neither_each_other_nor_a_point():
    figure, (ax,) = plots.panels(4, 3)
    points = [(1.5, 1.0), (1.5, 1.0), (1.52, 1.01), (1.0, 2.0), (2.0, 1.0)]
    ax.scatter(*zip(*points, strict=True))
    ax.margins(0.3)
    name_points(figure, ax, [f"a model, {i}" for i in range(len(points))], points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    marks = ax.transData.transform(points)
    assert len(boxes) == len(points)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    with pytest.raises(InputError, match="no place"):
        name_points(figure, ax, ["a name that is far too long for it" * 4], points[:1])


def test_lines_are_told_apart_without_colour():
    curve = pd.Series({0.5: 300.0, 1.0: 200.0})
    figure = plots.lines({"": {"plain": curve, "regular": curve / 2}}, "words", "PPL", ("LSTM", 66))
    first, second, floor = figure.axes[0].lines
    assert first.get_xydata().tolist() == [[0.5, 300.0], [1.0, 200.0]]
    assert first.get_linestyle() != second.get_linestyle() and floor.get_ydata()[0] == 66
    assert {"plain", "regular", "LSTM"} <= texts(figure)


def test_a_histogram_has_its_bins_and_its_limit():
    counts = pd.Series({1: 5, 17: 3, 33: 1})
    figure = plots.histograms({"a": counts, "b": counts}, "lines", {"b": (32, "1 is cut")})
    assert [bar.get_height() for bar in figure.axes[0].patches] == [5, 3, 1]
    assert not figure.axes[0].lines and figure.axes[1].lines[0].get_xdata()[0] == 32
    assert "1 is cut" in texts(figure)
