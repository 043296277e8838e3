"""The paper's Figures 2 and 3 with what was measured in their place."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crt_lib.show.plots import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    head,
    loop_color,
    panels,
    stack,
    styled,
)

LOOKS = {  # of the paper's values and of the columns of `crt_lib.study.paper`
    "paper": (BLACK, "s"),
    "released, as scored": (VERMILION, "v"),
    "released, no padding": (ORANGE, "^"),
    "causal": (GREY, "D"),
    "causal, 8 loops": (GREY, "P"),
    "crt2": (BLUE, "o"),
}
Rows = Sequence[Mapping[str, Any]]


@styled
def figure_2(
    curves: Mapping[str, Rows], ppl: pd.DataFrame, shares: pd.DataFrame, speeds: pd.DataFrame
) -> Figure:
    """Training, exits, where tokens exit, and speed against quality: the paper's four panels.

    `curves`: a name of LOOKS -> rows of metrics.jsonl; `ppl` and `speeds`: of
    `crt_lib.study.paper.table_2` and `speeds`; `shares`: a row a policy, a column an exit.
    """
    figure = Figure(figsize=(8, 5.8), layout="constrained")
    first = speeds.index[0]
    promised, *found = (
        f"{name} {speeds.loc[first, (name, 'speed')]:.1f}x" for name in speeds.columns.unique(0)
    )
    head(figure, f"Speed at exit {first}: {promised}; measured {', '.join(found)}")
    (training, exits), (leaving, trade) = figure.subplots(2, 2)
    for name, metrics in curves.items():
        last = max(key for key in metrics[0] if key.startswith("loss_"))
        for key, line in ((last, ":"), (f"valid_{last}", "-")):
            rows = [row for row in metrics if key in row]
            smooth = pd.Series([row[key] for row in rows]).rolling(50 if line == ":" else 1).mean()
            tokens = [row["tokens"] / 1e6 for row in rows]
            training.plot(tokens, smooth, line, color=LOOKS[name][0])
        training.plot([], "-", color=LOOKS[name][0], label=name)
    training.set(xlabel="tokens seen (millions)", ylabel="nats per token", ylim=(0, None))
    training.set_title("(a) Loss: training dotted, valid solid")
    training.legend()
    _by_exit(exits, ppl / ppl.loc[ppl.index[-1]])
    exits.set(ylabel="PPL, last exit = 1", title="(b) Exits against the last")
    stack(leaving, shares.T.to_dict(), {exit: loop_color(i) for i, exit in enumerate(shares, 1)})
    leaving.set(xlabel="share of the tokens", xlim=(0, 1), title="(c) Where tokens exit, crt2")
    leaving.legend(title="exit", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for name in speeds.columns.unique(0):
        color, marker = LOOKS[name]
        of = speeds[name]
        trade.scatter(of["speed"], of["PPL"], color=color, marker=marker, label=name)
    trade.axhline(1, color=BLACK, linewidth=0.8)
    trade.set(xlabel="speed, full depth = 1", ylabel="PPL, full depth = 1")
    trade.set_title("(d) Speed against quality")
    trade.legend()
    return figure


def _by_exit(ax: Axes, values: pd.DataFrame) -> None:
    for name in values:
        color, marker = LOOKS[name]
        ax.plot(values.index, values[name], marker=marker, color=color, label=name)
    ax.set(xlabel="exit after the paper's loop", xticks=list(values.index))


@styled
def figure_3(losses: pd.DataFrame) -> Figure:
    """Loss and perplexity of valid by exit; a column of `losses` is a name of LOOKS."""
    honest, last = losses.drop(columns="paper", errors="ignore"), losses.index[-1]
    ends = ", ".join(f"{name} {math.exp(end):.3g}" for name, end in honest.loc[last].items())
    title = f"Perplexity of the last exit: {ends}"
    figure, (left, right) = panels(8, 3, ("Loss", "Perplexity"), above=title)
    _by_exit(left, losses)
    _by_exit(right, losses.map(math.exp))
    left.set(yscale="log", ylabel="nats per token, valid")
    right.set(yscale="log", ylabel="PPL, valid")
    right.legend(loc="center", bbox_to_anchor=(0.5, 0.5))
    return figure
