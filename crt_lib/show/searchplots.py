"""The charts of the search: what changes are worth, and what depth buys."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from crt_lib.show.plots import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, loop_color, styled

Summary = Sequence[Mapping[str, Any]]


@styled
def ladder(panels: Mapping[str, Summary]) -> Figure:
    """A panel a budget: the loss of every arm, in order; a bar spans the seeds.

    `panels`: title -> rows of `crt_lib.study.search.summarise`.
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
def worth(panels: Mapping[str, Summary]) -> Figure:
    """A panel a recipe: what each change adds to the loss, with its interval; left is better.

    `panels`: title -> rows of `ablations.worth`, the first of them the base. Changes whose
    interval holds zero are grey, hollow where there is one seed; trainings that broke are left out.
    """
    shown = {
        title: [row for row in rows[1:] if math.isfinite(row["loss"])]
        for title, rows in panels.items()
    }
    most = max(len(rows) for rows in shown.values())
    figure = Figure(figsize=(8, 1.0 + 0.3 * most), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, (title, rows) in zip(axes, shown.items(), strict=True):
        for place, row in enumerate(rows):
            known = row["low"] is not None
            sure = known and not row["low"] <= 0 <= row["high"]
            color = GREY if not sure else VERMILION if row["adds"] > 0 else BLUE
            if known:
                ax.plot([row["low"], row["high"]], [place, place], color=color)
            filled = color if known else "none"
            ax.scatter([row["adds"]], [place], facecolor=filled, edgecolor=color, s=28, zorder=2)
            ax.annotate(
                f"{row['adds']:+.3f}",
                (row["adds"], place),
                (0, 5),
                textcoords="offset points",
                ha="center",
            )
        ax.set_yticks(range(len(rows)), [row["arm"].partition(", ")[2] for row in rows])
        ax.invert_yaxis()
        ax.axvline(0, color=BLACK, linewidth=0.8)
        ax.margins(x=0.2, y=0.25)
        ax.set(xlabel=f"added to {panels[title][0]['arm']} (nats)", title=title)
    return figure


@styled
def with_and_without(variants: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A line a variant of Table 3: its loss in the paper, with the leak, and without.

    `variants`: name -> a row of `crt_lib.study.ablations.searched_table_3`.
    """
    kinds = {"paper": "the paper", "symmetric": "with the leak", "deployable": "it, deployed"}
    kinds |= {"causal": "causal", "crt2": "crt2"}
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    ax = figure.subplots()
    colors = (GREY, BLUE, ORANGE, VERMILION, BLACK)
    for (name, row), color in zip(variants.items(), colors, strict=False):
        losses = [row[kind] if row[kind] is not None else math.nan for kind in kinds]
        ax.plot(list(kinds.values()), losses, color=color, marker="o", label=name)
    ax.set(ylabel="loss (nats a token)")
    ax.legend(ncols=2)
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


PERPLEXITIES = (60, 80, 100, 150, 200, 300)


@styled
def attempts(curves: Mapping[str, Sequence[tuple[float, float]]], published: float) -> Figure:
    """Perplexity on valid while training; `curves`: name -> (millions of words, perplexity)."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    for (name, pairs), color in zip(curves.items(), (VERMILION, BLUE, GREEN, ORANGE), strict=False):
        words, values = zip(*pairs, strict=True)
        ax.plot(words, values, marker="o", markersize=3, color=color, label=name)
    ax.axhline(published, color=GREY, linestyle="--", label=f"AWD-LSTM, test: {published}")
    ax.set(xlabel="words seen (millions)", ylabel="word perplexity, start of valid", yscale="log")
    ax.set_yticks(PERPLEXITIES, map(str, PERPLEXITIES))
    ax.minorticks_off()
    ax.legend()
    return figure


@styled
def scorings(rows: Summary) -> Figure:
    """Perplexities on a logarithmic axis; `rows` of `crt_lib.study.sota.leak_rows`."""
    figure = Figure(figsize=(8, 2.7), layout="constrained")
    ax = figure.subplots()
    names = [row["name"] for row in rows]
    values = [row["ppl"] for row in rows]
    colors = [VERMILION if row["sees"] else BLUE for row in rows]
    ax.barh(names, [value - 0.9 for value in values], left=0.9, color=colors)
    for at, value in enumerate(values):
        said = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        ax.annotate(said, (value, at), (4, 0), textcoords="offset points", va="center")
    ax.set(xscale="log", xlim=(0.9, max(values) * 4), xlabel="perplexity a token, valid")
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    marks = [Patch(color=VERMILION), Patch(color=BLUE)]
    ax.legend(marks, ["sees the token it predicts", "does not"], loc="lower right")
    return figure


@styled
def quality(rows: Summary, exits: Mapping[str, Mapping[int, float]]) -> Figure:
    """Bits per byte of models against their parameters and multiply-adds, and of exits by loop.

    `rows`: with `model`, `parameters`, `multiply_adds` and `bits_per_byte`, numbered in the figure
    as in the list; `exits`: model -> exit loop -> bits per byte.
    """
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    by_parameters, by_compute, by_exit = figure.subplots(1, 3)
    costs = {"parameters": by_parameters, "multiply_adds": by_compute}
    for cost, ax in costs.items():
        numbers: dict[tuple[float, float], list[str]] = {}
        for number, row in enumerate(rows, 1):
            own = BLUE if "crt2" in row["model"] else GREY
            point = row[cost] / 1e6, row["bits_per_byte"]
            ax.scatter(*point, color=own, s=28, zorder=3 if own == BLUE else 2)
            near = round(point[0], 2), round(point[1], 2)  # one label for points that coincide
            numbers.setdefault(near, []).append(str(number))
        for point, said in numbers.items():
            ax.annotate(", ".join(said), point, (4, 4), textcoords="offset points")
        ax.margins(0.15)
    by_parameters.set(xlabel="parameters (millions)", ylabel="test bits per byte")
    by_compute.set(xlabel="multiply-adds a token (millions)")
    for (name, bits), color in zip(exits.items(), (BLUE, VERMILION, ORANGE, BLACK), strict=False):
        by_exit.plot(list(bits), list(bits.values()), marker="o", color=color, label=name)
    by_exit.set(
        xlabel="exit after loop", xticks=sorted({loop for b in exits.values() for loop in b})
    )
    by_exit.legend()
    return figure
