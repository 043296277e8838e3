"""The charts of the loops: losses by exit, depth past training, the lens, exits against cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crt_lib.exits.perloop import Lens
from crt_lib.exits.trace import Outcome
from crt_lib.show.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    loop_color,
    styled,
)

Rows = Sequence[Mapping[str, Any]]
CRITERION_COLORS = dict(
    zip(
        ("confidence", "margin", "certainty", "similarity", "gate", "stability", "agreement"),
        (BLUE, SKY, GREEN, VERMILION, BLACK, ORANGE, PURPLE),
        strict=True,
    )
)


@styled
def losses_by_exit(rows: Rows) -> Figure:
    """Loss of every exit with its interval, and what each gains; rows of `exit_losses`."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _intervals(left, [row["exit"] for row in rows], [row["loss"] for row in rows])
    left.set(xlabel="exit after loop", ylabel="loss (nats a token)")
    later = rows[1:]
    _intervals(right, [row["exit"] for row in later], [row["takes_off"] for row in later])
    right.axhline(0, color=BLACK, linewidth=0.8)
    right.set(xlabel="exit after loop", ylabel="less than the exit before (nats)")
    return figure


def _intervals(ax: Axes, loops: Sequence[int], intervals: Sequence[Any]) -> None:
    for loop, interval in zip(loops, intervals, strict=True):
        low, high = interval.mean - interval.low, interval.high - interval.mean
        ax.errorbar(
            loop, interval.mean, [[low], [high]], fmt="o", color=loop_color(loop), capsize=3
        )
        ax.annotate(
            f"{interval.mean:.3f}", (loop, interval.mean), (8, 0), textcoords="offset points"
        )
    ax.set_xticks(loops)
    ax.margins(x=0.25)


@styled
def depth_past_training(rows: Rows) -> Figure:
    """Loss, and how far the state moves, against the number of loops; rows of `depth_sweep`."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    loops = [row["loops"] for row in rows]
    left.plot(loops, [row["loss"] for row in rows], color=GREY, zorder=1)
    for row in rows:
        face = loop_color(row["loops"]) if row["trained"] else "white"
        left.scatter(row["loops"], row["loss"], color=face, edgecolor=GREY, zorder=2)
    left.set(xlabel="loops run (filled: trained with a head)", ylabel="loss (nats a token)")
    later = rows[1:]
    numbers = [row["loops"] for row in later]
    right.plot(numbers, [1 - row["cosine"] for row in later], color=BLUE, label="1 - cosine")
    right.plot(numbers, [row["kl"] for row in later], color=VERMILION, label="KL (nats)")
    right.set(xlabel="loops run", ylabel="change from the loop before", yscale="log")
    right.legend()
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def lens(seen: Lens, start: int = 0, length: int = 14) -> Figure:
    """What each loop guesses after each token: its text on the probability it has."""
    part = slice(start, start + length)
    columns = seen.tokens[part]
    figure = Figure(
        figsize=(0.8 * len(columns) + 1, 0.42 * len(seen.guesses) + 1.2), layout="constrained"
    )
    ax = figure.subplots()
    shown = seen.probabilities[:, part]
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    following = [*seen.tokens[1:], ""][part]
    for i, guesses in enumerate(seen.guesses):
        for j, guess in enumerate(guesses[part]):
            right = guess == following[j]
            ax.text(
                j,
                i,
                _shown(guess),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if shown[i, j] > 0.6 else BLACK,
                fontweight="bold" if right else "normal",
            )
    ax.set_xticks(range(len(columns)), [_shown(token) for token in columns], rotation=45)
    ax.set_yticks(range(len(seen.guesses)), [f"loop {i + 1}" for i in range(len(seen.guesses))])
    ax.set(xlabel="after the token (bold: the guess is what follows)")
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="its probability")
    return figure


def _shown(token: str) -> str:
    return token.replace("\n", "\\n").replace("$", r"\$").strip(" ") or "_"


@styled
def exit_shares(outcomes: Mapping[str, Outcome], loops: Sequence[int]) -> Figure:
    """A stacked bar a policy: the share of the tokens that leave at each exit."""
    figure = Figure(figsize=(7, 0.7 + 0.32 * len(outcomes)), layout="constrained")
    ax = figure.subplots()
    left = np.zeros(len(outcomes))
    for i, loop in enumerate(loops):
        share = np.array([outcome.shares[i] for outcome in outcomes.values()])
        ax.barh(
            range(len(outcomes)), share, left=left, color=loop_color(loop), label=f"loop {loop}"
        )
        left += share
    ax.set_yticks(range(len(outcomes)), list(outcomes))
    ax.invert_yaxis()
    ax.set(xlabel="share of the tokens", xlim=(0, 1))
    ax.legend(ncols=len(loops), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


@styled
def speeds(rows: Rows) -> Figure:
    """Measured speed of each way of decoding, full depth = 1; a panel a batch size of the rows.

    Rows of `crt_lib.bench.decode.bench_decode`.
    """
    rows = [row for row in rows if row.get("speedup")]  # not the reading alone
    batches = sorted({row["batch"] for row in rows})
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(7.2, 0.8 + 0.2 * len(ways)), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for ax, batch in zip(axes, batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        places = [ways.index(row["way"]) for row in mine]
        ax.barh(places, [row["speedup"] for row in mine], color=BLUE)
        for place, row in zip(places, mine, strict=True):
            said, at = f"{row['speedup']:.2f}x", (max(row["speedup"], 1.0), place)
            ax.annotate(said, at, (3, 0), textcoords="offset points", va="center")
        ax.axvline(1, color=BLACK, linewidth=0.8)
        ax.margins(x=0.25)
        ax.set(xlabel="speed, full depth = 1", title=f"{batch} at a time")
    axes[0].set_yticks(range(len(ways)), ways)
    axes[0].invert_yaxis()
    return figure


@styled
def frontiers(curves: Mapping[str, Rows], points: Mapping[str, Outcome]) -> Figure:
    """Perplexity against multiply-adds: a line a criterion, and single policies as points.

    The dashed line joins the fixed exits (`exit <loop>`, `full depth`): tokens left to chance.
    """
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    ax = figure.subplots()
    _draw_curves(ax, curves)
    fixed = [points[name] for name in points if name.startswith(("exit", "full"))]
    fixed.sort(key=lambda outcome: outcome.multiply_adds)
    ax.plot(
        [outcome.multiply_adds / 1e6 for outcome in fixed],
        [outcome.token_ppl for outcome in fixed],
        color=GREY,
        linestyle="--",
        label="chance",
    )
    for name, outcome in points.items():
        at = (outcome.multiply_adds / 1e6, outcome.token_ppl)
        ax.scatter(*at, color=BLACK, marker="D", s=22, zorder=4)
        ax.annotate(name, at, (5, 4), textcoords="offset points", fontsize=8)
    ax.legend(fontsize=8)
    return figure


def _draw_curves(ax: Axes, curves: Mapping[str, Rows], strong: str | None = None) -> None:
    for name, rows in curves.items():
        ax.plot(
            [row["multiply_adds"] / 1e6 for row in rows],
            [np.exp(row["loss"]) for row in rows],
            color=CRITERION_COLORS.get(name, GREY),
            linewidth=2.4 if name == strong else 1.2,
            alpha=1.0 if strong in (None, name) else 0.35,
            label=name,
        )
    ax.set(xlabel="multiply-adds a token, heads included (millions)", ylabel="token perplexity")


@styled
def exit_view(
    loops: Sequence[int], curves: Mapping[str, Rows], outcome: Outcome, criterion: str | None
) -> Figure:
    """The explorer's picture: the frontier with the current point, and where tokens leave."""
    figure = Figure(figsize=(9.5, 3.0))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.17, top=0.96, wspace=0.22)
    _draw_curves(left, curves, criterion)
    left.scatter(
        outcome.multiply_adds / 1e6, outcome.token_ppl, color=BLACK, marker="D", s=50, zorder=4
    )
    left.legend(fontsize=7, ncols=2)
    places = range(len(loops))
    right.bar(places, outcome.shares, color=[loop_color(loop) for loop in loops])
    for place, share in zip(places, outcome.shares, strict=True):
        right.annotate(
            f"{share:.0%}", (place, share), (0, 2), textcoords="offset points", ha="center"
        )
    right.set_xticks(list(places), [f"loop {loop}" for loop in loops])
    right.set(ylabel="share of the tokens", ylim=(0, 1.1))
    return figure
