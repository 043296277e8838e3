"""The notebooks' figures of many models: what a change is worth, what models cost and reach."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from crt_lib.audit.compare import Interval
from crt_lib.files import InputError
from crt_lib.show import plots
from crt_lib.show.figures import Rows
from crt_lib.study.ablations import BROKE, NO_VERDICT, NOISE, ONE_SEED, finding

SHORT = {"better": "better", "worse": "worse", NOISE: "within the noise", ONE_SEED: "of one seed"}
SHORT |= {NO_VERDICT: "not tuned", BROKE: "broke"}  # of `ablations.finding`, for a title


def worth(tables: Mapping[str, Rows]) -> Figure:
    """A panel a recipe: what each change adds to the loss, with its interval; left is better.

    `tables`: recipe -> rows of `ablations.worth`; trainings that broke are left out. Panels say how
    many changes were found what, `ablations.finding`; grey: nothing was.
    """
    charts: dict[str, dict[str, plots.Value]] = {}
    no_verdict = set()
    for base, *changes in tables.values():
        counts = Counter(map(SHORT.get, map(finding, changes)))
        title = f"{base['arm']}: {', '.join(f'{n} {what}' for what, n in counts.items())}"
        trained = [row for row in changes if math.isfinite(row["loss"])]
        names = [row["arm"].partition(", ")[2] for row in trained]
        charts[title] = {
            name: row["adds"]
            if row["low"] is None
            else Interval(row["adds"], row["low"], row["high"])
            for name, row in zip(names, trained, strict=True)
        }
        no_verdict |= {
            (title, n) for n, row in zip(names, trained, strict=True) if not row["alike"]
        }
    return plots.dots(charts, "added to the loss (nats per token)", signed=True, open_to=no_verdict)


@plots.styled
def with_and_without(variants: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A mark a variant of Table 3: its loss in the paper, with the leak, and without.

    `variants`: name -> a row of `crt_lib.study.ablations.searched_table_3`.
    """
    kinds = {"paper": "the paper", "symmetric": "with the leak", "deployable": "it, deployed"}
    kinds |= {"causal": "causal", "crt2": "crt2"}
    best = []
    for kind in ("symmetric", "causal", "crt2"):
        name = min(variants, key=lambda name: variants[name][kind])
        best.append(f"{kinds[kind]} {name} ({variants[name][kind]:.2f})")
    figure, (ax,) = plots.panels(7, 3.2, (f"Lowest loss: {', '.join(best)}",))
    for i, ((name, row), marker) in enumerate(zip(variants.items(), "osD^v", strict=False)):
        beside = np.arange(len(kinds)) + 0.12 * (i - len(variants) // 2)
        losses = [math.nan if row[kind] is None else row[kind] for kind in kinds]
        ax.plot(beside, losses, marker=marker, linestyle="none", label=name)
    ax.set_xticks(range(len(kinds)), list(kinds.values()))
    ax.set(ylabel="loss (nats per token)")
    ax.legend(ncols=2)
    return figure


@plots.styled
def scorings(rows: Rows) -> Figure:
    """Perplexities on a logarithmic axis; `rows` of `crt_lib.study.sota.leak_rows`."""
    values = [row["ppl"] for row in rows]
    seen, honest = (
        [row["ppl"] for row in rows if row["sees"] is sees] or [math.nan] for sees in (True, False)
    )
    title = f"It sees the token that it predicts (filled): at most {max(seen):.3g}, "
    title += f"else at least {min(honest):.3g}"
    figure, (ax,) = plots.panels(8, 2.7, above=title)
    faces = ["black" if row["sees"] else "white" for row in rows]
    ax.scatter(values, range(len(rows)), s=36, c=faces, edgecolors="black")
    for place, value in enumerate(values):
        said = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        plots.say(ax, said, (value, place), right=True)
    ax.set(xlabel="perplexity per token, valid", xscale="log", xlim=(0.9, max(values) * 8))
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    return figure


@plots.styled
def quality(rows: Rows, exits: Mapping[str, Mapping[int, float]]) -> Figure:
    """Bits per byte of models against their parameters and multiply-adds, and of exits by loop.

    `rows`: with `model`, `parameters`, `multiply_adds` and `bits_per_byte`, `crt2` filled; `exits`:
    model -> exit loop -> bits per byte.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    *by_cost, by_loop = (
        figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :])
    )
    models = pd.DataFrame(rows)
    best = models.loc[models["bits_per_byte"].idxmin()]
    plots.head(figure, f"Lowest after equal tokens: {best['model']}, {best['bits_per_byte']:.3f}")
    faces = np.where(models["model"].str.contains("crt2"), "black", "white")
    for ax, cost in zip(by_cost, ("parameters", "multiply_adds"), strict=True):
        places = models[[cost, "bits_per_byte"]].div([1e6, 1])
        ax.scatter(places[cost], places["bits_per_byte"], s=28, c=faces, edgecolors="black")
        unit = "millions" if cost == "parameters" else "millions per token"
        ax.set(xlabel=f"{cost.replace('_', '-')} ({unit})", ylabel="test bits per byte")
        ax.margins(0.3, 0.15)
    for name, bits in exits.items():
        by_loop.plot(list(bits), list(bits.values()), marker="o", label=name)
    lowest = {name: min(bits.values()) for name, bits in exits.items()}
    first = min(lowest, key=lowest.__getitem__)
    title = f"Best exit of the stored runs: {first}, {lowest[first]:.3f}"
    by_loop.set(xlabel="loops run; of a GPT-2 its layers", ylabel="test bits per byte", title=title)
    by_loop.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_loop.legend()
    for ax, cost in zip(by_cost, ("parameters", "multiply_adds"), strict=True):
        places = models[[cost, "bits_per_byte"]].div([1e6, 1])
        name_points(figure, ax, models["model"], places.itertuples(index=False, name=None))
    return figure


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
        line = {
            "arrowstyle": "-",
            "color": plots.GREY,
            "linewidth": 0.7,
            "shrinkA": 0,
            "shrinkB": 3,
        }
        look: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 8, "arrowprops": line}
        ax.annotate(name, point, (x, y), textcoords="offset points", **look)
