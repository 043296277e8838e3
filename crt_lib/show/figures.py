"""The notebooks' figures of one model: its parts, its training, and its exits.

Rows are the dictionaries that the functions named return, or the files that they were kept in.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crt_lib.bench.exits import MIX, ORACLE
from crt_lib.exits.policy import CRITERIA
from crt_lib.exits.trace import Outcome
from crt_lib.show import plots

Rows = Sequence[Mapping[str, Any]]
PARTS = {  # the parts of `crt_lib.audit.accounting`; neighbours differ in lightness
    "token embedding": plots.BLUE,
    "embedding projection": plots.BLACK,
    "embedding TRM": plots.SKY,
    "attention": plots.GREEN,
    "block TRM": "#F0E442",
    "prelude": plots.ORANGE,
    "heads": plots.VERMILION,
    "positions and loop encodings": plots.PURPLE,
    "block norms": plots.GREY,
}


@plots.styled
def parts_of_models(models: Mapping[str, Mapping[str, int]], unit: str, title: str = "") -> Figure:
    """A bar a model: counts by part (of `accounting`), in millions of `unit`."""
    millions = {name: {p: n / 1e6 for p, n in counts.items()} for name, counts in models.items()}
    return plots.stacked(millions, PARTS, f"million {unit}", "{:.1f} M", title)


def losses(rows: Rows, prefix: str, against: str) -> dict[int, pd.Series]:
    """exit -> the losses in the column that `prefix` begins, where a row has them."""
    columns = pd.DataFrame(rows).set_index(against).filter(regex=rf"^{prefix}\d+$")
    found = {int(name.removeprefix(prefix)): columns[name].dropna() for name in map(str, columns)}
    return dict(sorted(found.items()))


def _smooth(curve: pd.Series) -> pd.Series:
    """The running mean over a fiftieth of the values."""
    return curve.rolling(max(len(curve) // 50, 1), min_periods=1).mean()


def training_curves(metrics: Rows, floor: float | None = None) -> Figure:
    """Loss of every exit against tokens seen: of the training batches, smoothed, and of valid.

    `metrics`: rows of metrics.jsonl; `floor`: a loss no causal model can beat, where it is known.
    """
    rows = [{**row, "tokens": row["tokens"] / 1e6} for row in metrics]
    trained, valid = (losses(rows, prefix, "tokens") for prefix in ("loss_", "valid_loss_"))
    ends = {loop: curve.iloc[-1] for loop, curve in valid.items() if len(curve)}
    lowest = f": exit {min(ends, key=ends.__getitem__)} ends lowest" if ends else ""
    charts = {
        "Training batches (running mean)": {f"exit {n}": _smooth(c) for n, c in trained.items()},
        f"Validation text{lowest}": {f"exit {n}": curve for n, curve in valid.items()},
    }
    looks = {f"exit {loop}": plots.loop_look(loop) for loop in trained}
    dashed = None if floor is None else ("entropy rate", floor)
    label = "loss (nats per token)"
    return plots.lines(charts, "tokens seen (millions)", label, dashed, looks, sharey=True)


def training_losses(
    runs: Mapping[str, Rows], floor: float | None = None, title: str = ""
) -> Figure:
    """The last exit's loss on training batches, a line a run, smoothed where there are many.

    `runs`: metrics by name; `floor`: nats per token that no causal model can score below.
    """
    curves = {}
    for name, metrics in runs.items():
        *_, last = losses(metrics, "loss_", "tokens").values()
        curves[name] = _smooth(last)
    label = "tokens seen"
    if max(curve.index.max() for curve in curves.values()) >= 1e6:
        label = "tokens seen (million)"
        curves = {name: curve.set_axis(curve.index / 1e6) for name, curve in curves.items()}
    dashed = None if floor is None else ("entropy of the text", floor)
    return plots.lines({title: curves}, label, "training loss (nats per token)", dashed)


@plots.styled
def same_updates(page: Rows, trained: Rows) -> Figure:
    """Losses by exit and update: those of `page` as marks over the lines of `trained`.

    Rows with `update` and `loss_<exit>`; an exit is drawn where an update trained it.
    """
    circles, lines = losses(page, "loss_", "update"), losses(trained, "loss_", "update")
    apart = max((circles[loop] - curve).abs().max() for loop, curve in lines.items())
    title = f"train() (lines) and the page (marks): at most {apart:.1g} nats apart"
    figure, (ax,) = plots.panels(6.5, 3.2, (title,))
    for loop, curve in lines.items():
        look = plots.loop_look(loop)
        label: dict[str, Any] = {"label": f"exit {loop}", "markerfacecolor": "none"}
        ax.plot(curve, **look | {"marker": "None"}, linewidth=1.2)
        ax.plot(circles[loop], **look | {"linestyle": "None"}, **label)
    ax.set(xlabel="update", ylabel="training loss (nats per token)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


@plots.styled
def depth_past_training(rows: Rows) -> Figure:
    """Loss, and how far the state moves, against the number of loops; rows of `depth_sweep`."""
    swept = pd.DataFrame(rows).set_index("loops")
    later = swept[1:]
    settles = (1 - later["cosine"]).is_monotonic_decreasing and later["kl"].is_monotonic_decreasing
    moves = "Each loop moves the state less" if settles else "How far a loop moves the state"
    titles = (f"The loss is least after {swept['loss'].idxmin()} loops", moves)
    figure, (left, right) = plots.panels(8, 2.8, titles)
    faces = [plots.loop_color(row["loops"]) if row["trained"] else "white" for row in rows]
    left.plot(swept["loss"], color=plots.GREY, linestyle="-", zorder=1)
    left.scatter(swept.index, swept["loss"], c=faces, edgecolors=plots.GREY, zorder=2)
    left.set(xlabel="loops run (filled: trained with a head)", ylabel="loss (nats per token)")
    right.plot(1 - later["cosine"], label="1 - cosine")
    right.plot(later["kl"], label="KL (nats per token)")
    right.set(xlabel="loops run", ylabel="change by a loop", yscale="log")
    right.legend()
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@plots.styled
def exit_shares(outcomes: Mapping[str, Outcome], loops: Sequence[int]) -> Figure:
    """A bar a policy: the share of the tokens that exit after each loop, whose number it has."""
    names = [f"loop {loop}" for loop in loops]
    shares = {name: dict(zip(names, o.shares, strict=True)) for name, o in outcomes.items()}
    colors = {f"loop {loop}": plots.loop_color(loop) for loop in loops}
    figure = plots.stacked(shares, colors, "share of the tokens")
    (ax,) = figure.axes
    for bars in ax.containers:
        assert isinstance(bars, BarContainer)
        loop = int(str(bars.get_label()).removeprefix("loop "))
        said = [str(loop) if bar.get_width() > 0.03 else "" for bar in bars]  # room for it
        ax.bar_label(bars, said, label_type="center", color="white" if loop > 2 else plots.BLACK)
    judged = [o for name, o in outcomes.items() if name in CRITERIA]
    fixed = sum(max(o.shares) == 1 for o in judged)
    if judged:
        ax.set_title(f"{fixed} of {len(judged)} calibrated criteria take one exit for all tokens")
    return figure


@plots.styled
def frontiers(curves: Mapping[str, Rows], points: Mapping[str, Outcome]) -> Figure:
    """Perplexity against multiply-adds: a line a criterion, and single policies as points.

    The grey line joins the fixed exits (`exit <loop>`, `full depth`): tokens left to chance.
    """
    free = _costs_nothing(curves, points)
    figure, (ax,) = plots.panels(6.5, 3.8, (f"Cheaper than full depth and no worse: {free}",))
    draw_curves(ax, curves)
    places = {name: (o.multiply_adds / 1e6, o.token_ppl) for name, o in points.items()}
    fixed = sorted(at for name, at in places.items() if name.startswith(("exit", "full")))
    ax.plot(*zip(*fixed, strict=True), color=plots.GREY, linestyle="--", label="chance")
    for name, at in places.items():
        ax.scatter(*at, color=plots.BLACK, marker="D", s=22, zorder=4)
        plots.say(ax, name, at)
    ax.margins(y=0.1)
    ax.legend(fontsize=8)
    return figure


def _costs_nothing(curves: Mapping[str, Rows], points: Mapping[str, Outcome]) -> str:
    """The fixed exits and criteria that reach full depth's loss at less cost, in words."""
    full = points["full depth"]
    places = {name: [vars(outcome)] for name, outcome in points.items()} | dict(curves)
    free = (
        name
        for name, rows in places.items()
        if any(r["multiply_adds"] < full.multiply_adds and r["loss"] <= full.loss for r in rows)
    )
    return ", ".join(free) or "none"


def draw_curves(ax: Axes, curves: Mapping[str, Rows], strong: str | None = None) -> None:
    """A line a criterion, of rows of `perloop.frontier`; the one of `strong` in front."""
    for name, rows in curves.items():
        ax.plot(
            [row["multiply_adds"] / 1e6 for row in rows],
            [math.exp(row["loss"]) for row in rows],
            **plots.policy_look(name) | {"marker": "None"},
            linewidth=2.4 if name == strong else 1.2,
            alpha=1.0 if strong in (None, name) else 0.5,
            label=name,
        )
    ax.set(xlabel="multiply-adds per token, heads included (millions)", ylabel="token perplexity")


@plots.styled
def exits_in_time(rows: Rows) -> Figure:
    """What policies lose against their speed, on the same tokens; a panel a number of texts.

    `rows` of `bench_exits`. The grey line joins the fixed exits; hollow: a random mix of them, of
    the mean depth of the filled mark. What loses far more or less than the rest is written.
    """
    table = pd.DataFrame(rows)
    table["lost"] = 100 * np.expm1(table["above"].astype(float))
    table["fixed"] = table["policy"].str.startswith(("exit ", "full depth"))
    most = 2 * max(1.0, table["lost"][~table["fixed"]].max())
    table["far"] = (table["policy"] == ORACLE) | table["fixed"] & (table["lost"] > most)
    near = table[~table["far"]]
    counts = sorted(set(table["rows"].tolist()))
    titles = [
        f"{n} text{'s' * (n > 1)} at a time: {_fastest(table[table['rows'] == n])}" for n in counts
    ]
    with matplotlib.rc_context({"font.size": 11, "axes.titlesize": 12}):
        figure, axes = plots.panels(9.5, 4.4, titles, sharey=True)
        for ax, count in zip(axes, counts, strict=True):
            _in_time(ax, table[table["rows"] == count].set_index("policy"))
        low, high = near["lost"].min(), near["lost"].max()
        room = 0.15 * max(high - low, 1)
        axes[0].set(ylabel="perplexity above full depth (%)", ylim=(low - 3 * room, high + room))
        handles, labels = axes[0].get_legend_handles_labels()
        look: dict[str, Any] = {"c": "white", "edgecolors": plots.BLACK}
        handles.append(axes[0].scatter([], [], s=60, **look))
        handles.append(axes[0].scatter([], [], s=190, **look))
        labels += ["hollow: a random mix of fixed exits, as deep"]
        labels += [f"after this loop all tokens exit ({table['mean_loops'].max():.0f}: full depth)"]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=11)
    return figure


def _in_time(ax: Axes, panel: pd.DataFrame) -> None:
    """A panel of `exits_in_time`: fixed exits as their numbers, other policies as marks."""
    fixed = panel[panel["fixed"]].sort_values("mean_loops")
    ax.plot(fixed["speedup"], fixed["lost"], "--", color=plots.GREY, zorder=1)
    for _, row in fixed.iterrows():
        at = row["speedup"], row["lost"]
        ring: dict[str, Any] = {"c": [("white", 0.5)], "edgecolors": plots.BLACK, "s": 190}
        ax.scatter(*at, zorder=5, **ring)  # a mark behind it shows
        ax.scatter(*at, c=plots.BLACK, marker=f"${row['mean_loops']:.0f}$", s=60, zorder=6)
    for name, row in panel[panel["asks"] > 0].iterrows():
        look = plots.policy_look(str(name))
        mark: dict[str, Any] = {"marker": look["marker"], "edgecolors": look["color"], "s": 60}
        mix = panel.loc[f"{MIX}{name}"]
        ax.scatter(row["speedup"], row["lost"], c=look["color"], label=name, zorder=4, **mark)
        ax.scatter(mix["speedup"], mix["lost"], c="white", zorder=3, **mark)
    written = [
        f"{name}: {row['speedup']:.2f}x, {row['lost']:+.0f} %"
        for name, row in panel[panel["far"]].iterrows()
    ]
    ax.text(0.03, 0.03, "\n".join(written), transform=ax.transAxes)
    speeds = panel["speedup"][~panel["far"]]
    room = 0.12 * (speeds.max() - speeds.min())
    ax.set(xlabel="speed, full depth = 1", xlim=(speeds.min() - room, speeds.max() + room))


def _fastest(panel: pd.DataFrame) -> str:
    """The fastest fixed exit that lost nothing here, and how fast it is, in words."""
    free = panel[panel["fixed"] & (panel["lost"] <= 0) & (panel["speedup"] > 1)]
    if free.empty:
        return "no exit\nis faster without loss"
    best = free.loc[free["speedup"].idxmax()]
    return f"{best['policy']} is\n{best['speedup']:.1f} times as fast, no loss here"
