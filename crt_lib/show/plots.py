"""What figures are drawn with: one style, colours of loops, saving, and a chart of each kind.

Charts map the title of a panel to its data. Nothing here uses pyplot: no figure stays open.
"""

import io
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from crt_lib.audit.compare import Interval
from crt_lib.files import InputError, atomic_path
from crt_lib.runs.manifest import checkout_root

COLORS = 256  # of a saved picture: by eye as the full ones
# Okabe and Ito's palette, told apart under every common colour blindness
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, BLACK, GREY = "#56B4E9", "#D55E00", "#000000", "#999999"
# of loops 1 to 8; lightness falls from 82 to 0, most over the first four, which small models have
LOOPS = ("#E5CB22", "#3BA67E", "#2B6E8F", "#452F7A", "#3B2768", "#2E1D52", "#1B1030", "#000000")
MARKS, DASHES = "osD^v", ("-", "--", "-.", (0, (5, 1)), ":")  # of loops, from the first on
POLICIES = {  # colour, line and marker of a criterion, in every figure
    "the paper's thresholds": (ORANGE, "-", "v"),
    "confidence": (ORANGE, (0, (5, 1)), "P"),
    "margin": (PURPLE, "--", "X"),
    "certainty": (GREEN, "-.", "D"),
    "similarity": (BLUE, "--", "^"),
    "gate": (VERMILION, "-", "s"),
    "stability": (SKY, "-.", "p"),
    "agreement": (BLACK, ":", "h"),
}
STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_name("style.mplstyle"), use_default_template=False
)
styled = matplotlib.rc_context(STYLE)  # decorates a function, so that its figure has the style


def loop_color(loop: int) -> str:
    """The colour of a loop, the same in every figure: the later, the darker, up to loop 8."""
    return LOOPS[min(loop, len(LOOPS)) - 1]


def loop_look(loop: int) -> dict[str, Any]:
    """Colour, line and marker of a loop, which differ from its neighbours' in grey too."""
    place = (loop - 1) % len(MARKS)
    return {"color": loop_color(loop), "linestyle": DASHES[place], "marker": MARKS[place]}


def policy_look(name: str) -> dict[str, Any]:
    """Colour, line and marker of a criterion, the same in every figure; grey for another name."""
    return dict(
        zip(("color", "linestyle", "marker"), POLICIES.get(name, (GREY, ":", "o")), strict=True)
    )


def results_folder(profile: str, results: str = "") -> Path:
    """`results` itself, or results/<profile> of the checkout where it is empty.

    Raises InputError for a profile that is no name.
    """
    if not isinstance(profile, str):
        raise InputError(f"profile is {profile!r}; give the name of one")
    return Path(results) if results else checkout_root() / "results" / profile


@dataclass(frozen=True)
class Picture:
    """A PNG, as a notebook shows it."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


def save_figure(figure: Figure, results: str | Path, name: str) -> Picture:
    """Write the figure to `results`/figures/`name`.png, atomically; what it holds, to be shown.

    In COLORS colours, which is a third of the bytes. A file that holds the same picture already is
    left alone.
    """
    drawn, kept = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format="png", dpi=figure.dpi)
    image = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    image.save(kept, "PNG", optimize=True)
    path, png = Path(results) / "figures" / f"{name}.png", kept.getvalue()
    if not (path.is_file() and path.read_bytes() == png):
        with atomic_path(path) as temporary:
            temporary.write_bytes(png)
    return Picture(png)


def panels(
    width: float, height: float, titles: Iterable[str] = ("",), above: str = "", **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of these inches, with an axes side by side for each title; `above`: one for all."""
    figure = Figure(figsize=(width, height + 0.22 * bool(above)), layout="constrained")
    head(figure, above)
    titles = list(titles)
    axes = list(figure.subplots(1, len(titles), squeeze=False, **shared)[0])
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    return figure, axes


def head(figure: Figure, title: str) -> None:
    """Write what a figure shows above all of its panels; nothing where `title` is empty."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")


def say(ax: Axes, text: str, at: tuple[float, float], right: bool = False) -> None:
    """Write above a point, or to its right, over whatever lines pass there."""
    ax.annotate(
        text,
        at,
        (6, 0) if right else (0, 4),
        textcoords="offset points",
        ha="left" if right else "center",
        va="center" if right else "bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8},
    )


Value = float | Interval  # an interval is drawn around its mean


def ends_of(values: Iterable[Value]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The means of values, and the lows and highs around them."""
    ends = [(v.mean, v.low, v.high) if isinstance(v, Interval) else (v, v, v) for v in values]
    means, lows, highs = np.array(ends, dtype=float).T
    return means, lows, highs


@styled
def by_exit(
    charts: Mapping[str, Mapping[int, Value]],
    ylabel: str | Sequence[str] = "",
    single: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """A point an exit loop, in its colour; a panel a title, below `title`.

    `ylabel`: of the first panel, or one for each. `single`: a model of one loop's.
    """
    figure, axes = panels(8, 2.9, charts, above=title)
    for ax, (title, values) in zip(axes, charts.items(), strict=True):
        loops, (means, lows, highs) = list(values), ends_of(values.values())
        colors = [loop_color(loop) for loop in loops]
        ranged = bool(np.any(lows < highs))
        ax.vlines(loops, lows, highs, colors)
        ax.scatter(loops, means, s=15 if ranged else 45, c=colors, zorder=2)
        for loop, mean in zip(loops, means, strict=True):
            say(ax, f"{mean:.3f}", (loop, mean), right=ranged)
        if lows.min() < 0:
            ax.axhline(0, color=BLACK, linewidth=0.8, zorder=1)
        if single is not None:
            ax.axhline(single[title], color=BLACK, linestyle="--", label="a model of one loop")
            ax.legend()
        ax.set(xlabel="exit after loop", xticks=loops)
        ax.margins(x=0.25, y=0.25)
    for ax, label in zip(axes, [ylabel] if isinstance(ylabel, str) else ylabel, strict=False):
        ax.set_ylabel(label)
    return figure


@styled
def dots(
    charts: Mapping[str, Mapping[str, Value]],
    xlabel: str,
    signed: bool = False,
    open_to: Container[tuple[str, str]] = (),
    title: str = "",
) -> Figure:
    """A point a name, a row each, over its interval; a panel a title; `title` stands above all.

    `signed` values are differences: below zero blue, above red, grey where that is not sure, as in
    those of `open_to`, pairs of panel and name.
    """
    figure, axes = panels(8, 0.9 + 0.29 * max(map(len, charts.values())), charts, above=title)
    for ax, (panel, values) in zip(axes, charts.items(), strict=True):
        places, (means, lows, highs) = range(len(values)), ends_of(values.values())
        colors = [
            BLUE if not signed else GREY if (panel, name) in open_to else _sign(*ends)
            for name, *ends in zip(values, means, lows, highs, strict=True)
        ]
        ax.hlines(places, lows, highs, colors)
        ax.scatter(means, places, s=28, c=colors, zorder=2)
        for place, mean in zip(places, means, strict=True):
            say(ax, f"{mean:+.3f}" if signed else f"{mean:.3f}", (mean, place))
        if signed:
            ax.axvline(0, color=BLACK, linewidth=0.8, zorder=1)
        ax.set_yticks(places, list(values))
        ax.set(xlabel=xlabel, ylim=(len(values) - 0.5, -0.8))
        ax.margins(x=0.2)
    return figure


def _sign(mean: float, low: float, high: float) -> str:
    """The colour of a difference."""
    if low == high or low <= 0 <= high:
        return GREY
    return BLUE if mean < 0 else VERMILION


@styled
def histograms(
    charts: Mapping[str, pd.Series], ylabel: str, limits: Mapping[str, tuple[float, str]]
) -> Figure:
    """A bar a bin: counts over where bins start; a panel a title. `limits`: where, and a note."""
    figure, axes = panels(8, 3, charts)
    for ax, (title, counts) in zip(axes, charts.items(), strict=True):
        width = counts.index[1] - counts.index[0]
        ax.bar(counts.index, counts, width * 0.9, align="edge", color=BLUE)
        if title in limits:
            at, note = limits[title]
            ax.axvline(at, color=BLACK, linestyle="--")
            right = at * 0.97 if at > counts.index[-1] / 2 else counts.index[-1]
            ax.text(right, 0.95, note, ha="right", va="top", transform=ax.get_xaxis_transform())
    axes[0].set_ylabel(ylabel)
    return figure


@styled
def bars(
    charts: Mapping[str, Mapping[str, float]], xlabel: str, form: str, mark: float = 0.0
) -> Figure:
    """A bar a name with its value; a panel a title, the same rows in each; a line at `mark`."""
    names = list(dict.fromkeys(name for values in charts.values() for name in values))
    figure, axes = panels(7.5, 0.9 + 0.24 * len(names), charts, sharey=True)
    for ax, values in zip(axes, charts.values(), strict=True):
        places = [names.index(name) for name in values]
        ax.barh(places, list(values.values()), color=BLUE)
        for place, value in zip(places, values.values(), strict=True):
            say(ax, form.format(value), (max(value, mark), place), right=True)
        ax.axvline(mark, color=BLACK, linewidth=0.8)
        ax.set(xlabel=xlabel)
        ax.margins(x=0.2)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


@styled
def stacked(
    charts: Mapping[str, Mapping[Any, float]],
    colors: Mapping[Any, str],
    xlabel: str,
    form: str = "",
    title: str = "",
) -> Figure:
    """A bar a name of its parts, in the order of `colors`; `form` says its whole at its end."""
    figure, (ax,) = panels(8, 1.3 + 0.36 * len(charts), above=title)
    wholes = stack(ax, charts, colors)
    for place, whole in enumerate(wholes):
        say(ax, form.format(whole), (whole, place), right=True)
    ax.set(xlabel=xlabel, xlim=(0, wholes.max() * (1.13 if form else 1)))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def stack(
    ax: Axes, charts: Mapping[str, Mapping[Any, float]], colors: Mapping[Any, str]
) -> np.ndarray:
    """Draw a bar a name of its parts, in the order of `colors`; returns the bars' wholes."""
    left = np.zeros(len(charts))
    for part, color in colors.items():
        widths = np.array([parts.get(part, 0) for parts in charts.values()])
        if widths.any():
            ax.barh(list(charts), widths, 0.7, left, color=color, label=part, edgecolor="white")
        left += widths
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    return left


@styled
def lines(
    charts: Mapping[str, Mapping[str, pd.Series]],
    xlabel: str,
    ylabel: str = "",
    floor: tuple[str, float] | None = None,
    looks: Mapping[str, Mapping[str, Any]] | None = None,
    sharey: bool = False,
) -> Figure:
    """A line a name, over its index, with the look given or the next; a panel a title.

    `floor`: what a dashed line is called, and where it is.
    """
    figure, axes = panels(8 if len(charts) > 1 else 6.5, 3.1, charts, sharey=sharey)
    for ax, curves in zip(axes, charts.values(), strict=True):
        for name, curve in curves.items():
            look = {"marker": "o", **(looks[name] if looks else {})}
            ax.plot(curve, label=name, **look | ({} if len(curve) < 25 else {"marker": "None"}))
        if floor is not None:
            ax.axhline(floor[1], color=BLACK, linestyle="--", label=floor[0])
        ax.set(xlabel=xlabel)
    axes[0].set_ylabel(ylabel)
    if any(curves) or floor:
        axes[-1].legend()
    return figure
