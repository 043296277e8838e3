"""The charts of the search: what changes are worth, and what depth buys."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from crt_lib.plots import BLACK, BLUE, GREY, ORANGE, VERMILION, loop_color, styled

Summary = Sequence[Mapping[str, Any]]


@styled
def ladder(panels: Mapping[str, Summary]) -> Figure:
    """A panel a budget: the loss of every arm, in order; a bar spans the seeds.

    `panels`: title -> rows of `crt_lib.search.summarise`.
    """
    arms = list(dict.fromkeys(row["arm"] for rows in panels.values() for row in rows))
    figure = Figure(figsize=(8, 0.9 + 0.27 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        places = [arms.index(row["arm"]) for row in rows]
        losses = [row["loss"] for row in rows]
        ax.plot(losses, places, color=GREY, linewidth=0.8, zorder=1)
        ax.errorbar(
            losses,
            places,
            xerr=[
                [row["loss"] - row["low"] for row in rows],
                [row["high"] - row["loss"] for row in rows],
            ],
            fmt="none",
            ecolor=BLACK,
        )
        ax.scatter(losses, places, color=BLUE, s=28, zorder=2)
        for place, row in zip(places, rows, strict=True):
            ax.annotate(
                f"{row['loss']:.3f}", (row["loss"], place), (6, 3), textcoords="offset points"
            )
        ax.set(xlabel="validation loss (nats a token)", title=title)
        ax.margins(x=0.25)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    return figure


@styled
def differences(rows: Summary, base: Mapping[str, Any]) -> Figure:
    """Bars: the loss of each arm minus that of `base`, best first; right of zero is worse."""
    rows = sorted(rows, key=lambda row: row["loss"])
    figure = Figure(figsize=(7, 0.8 + 0.24 * len(rows)), layout="constrained")
    ax = figure.subplots()
    deltas = [row["loss"] - base["loss"] for row in rows]
    colors = [BLUE if delta < 0 else VERMILION for delta in deltas]
    ax.barh(range(len(rows)), deltas, color=colors)
    for place, delta in enumerate(deltas):
        side = 3 if delta >= 0 else -3
        ax.annotate(
            f"{delta:+.3f}",
            (delta, place),
            (side, 0),
            textcoords="offset points",
            va="center",
            ha="left" if delta >= 0 else "right",
        )
    ax.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    ax.invert_yaxis()
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.margins(x=0.18)
    ax.set(xlabel=f"validation loss minus that of {base['arm']} (nats a token)")
    return figure


@styled
def depth(lines: Mapping[str, Mapping[int, float]], single: Mapping[str, float]) -> Figure:
    """Loss of each exit against its loop, a line a training length.

    `lines`: label -> exit loop -> loss; `single`: the same label -> loss of a model of one loop.
    """
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots(1, len(lines), squeeze=False)[0]
    for ax, (label, losses) in zip(axes, lines.items(), strict=True):
        loops = sorted(losses)
        values = [losses[loop] for loop in loops]
        ax.plot(loops, values, color=GREY, zorder=1)
        ax.scatter(loops, values, color=[loop_color(loop) for loop in loops], s=45, zorder=2)
        for loop, value in zip(loops, values, strict=True):
            ax.annotate(
                f"{value:.3f}", (loop, value), (0, 6), textcoords="offset points", ha="center"
            )
        if label in single:
            ax.axhline(single[label], color=ORANGE, linestyle="--", label="a model of one loop")
            ax.legend()
        ax.set(xlabel="exit after loop", xticks=loops, title=label)
        ax.margins(x=0.15, y=0.3)
    axes[0].set_ylabel("validation loss (nats a token)")
    return figure


@styled
def race(runs: Mapping[str, Summary]) -> Figure:
    """The training loss of the last exit against updates; `runs`: label -> rows of metrics."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    for (label, metrics), color in zip(runs.items(), (VERMILION, BLUE, ORANGE, GREY), strict=False):
        loops = {int(key[5:]) for row in metrics for key in row if key.startswith("loss_")}
        last = f"loss_{max(loops)}"
        rows = [row for row in metrics if last in row]
        ax.plot(
            [row["update"] for row in rows], [row[last] for row in rows], color=color, label=label
        )
    ax.set(xlabel="update", ylabel="training loss of the last exit (nats)")
    ax.legend()
    return figure
