"""Names beside the points of a figure, where neither another name nor a point is."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from crt_lib.files import InputError
from crt_lib.show.plots import GREY


def name_points(
    figure: Figure, ax: Axes, names: Iterable[str], points: Iterable[tuple[float, float]]
) -> None:
    """Write each name where nothing else is, as near to its point as that goes, and join them.

    Call it when all else is drawn: the figure's layout is kept from then on. Raises InputError for
    a name that does not fit.
    """
    points = list(points)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    inside, dot = ax.get_window_extent(), figure.dpi / 72  # dots a point of the printer
    taken = [Bbox([at - 5 * dot, at + 5 * dot]) for at in ax.transData.transform(points)]
    ways = itertools.product((9, 16, 24, 34, 46, 60, 76, 94), range(0, 360, 20))
    turns = [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for r, a in ways]
    for name, point in sorted(zip(names, points, strict=True), key=lambda pair: -pair[1][1]):
        measured = figure.text(0, 0, name, fontsize=8)
        width, height = measured.get_window_extent().size
        measured.remove()
        for x, y in turns:
            side = "center" if abs(x) < abs(y) else "left" if x > 0 else "right"
            left, bottom = ax.transData.transform(point) + dot * np.array([x, y])
            left -= {"center": 0.5, "left": 0, "right": 1}[side] * width
            box = Bbox.from_bounds(left - 2, bottom - height / 2 - 2, width + 4, height + 4)
            if all(inside.contains(*end) for end in (box.min, box.max)) and not any(
                map(box.overlaps, taken)
            ):
                break
        else:
            raise InputError(f"no place in the figure for {name!r}; draw it larger")
        taken.append(box)
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        look: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 8, "arrowprops": line}
        ax.annotate(name, point, (x, y), textcoords="offset points", **look)
