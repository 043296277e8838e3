"""The notebooks' charts: data in, a matplotlib Figure out, all in one style.

Diagrams of the model and of batches are in `diagrams`. Rows are the dictionaries that
`crt_lib.text.stats` and `crt_lib.runs.run` return. Nothing here uses pyplot: no figure stays
open.
"""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from crt_lib.audit.causality import CausalityReport
from crt_lib.data import MIN_LINE
from crt_lib.files import InputError, atomic_path
from crt_lib.runs.manifest import checkout_root

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette, told apart under every common colour blindness
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, BLACK, GREY = "#56B4E9", "#D55E00", "#000000", "#999999"
_LOOPS = (SKY, ORANGE, VERMILION, GREEN, GREY, PURPLE, BLACK, BLUE)  # of loops 1, 2, ..., 8
_MARKERS = "vosDP^Xd"
_CORPORA = (BLUE, SKY, GREEN, ORANGE)
_PARTS = {  # the parts of `crt_lib.audit.accounting`
    "token embedding": BLUE,
    "embedding projection": BLACK,
    "embedding TRM": SKY,
    "attention": GREEN,
    "block TRM": VERMILION,
    "prelude": "#F0E442",
    "heads": ORANGE,
    "positions and loop encodings": PURPLE,
    "block norms": GREY,
}


def style() -> dict["RcKeyType", Any]:
    """The matplotlib settings of every figure."""
    return {
        "figure.dpi": 110,
        "figure.facecolor": "white",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "lines.linewidth": 1.5,
        "lines.markersize": 4,
    }


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a drawing function so that what it makes has the project's style."""

    @functools.wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(style()):
            return draw(*args, **kwargs)

    return in_style


def loop_color(loop: int) -> str:
    """The colour of a loop, the same in every figure; beyond loop 8 the colours repeat."""
    return _LOOPS[(loop - 1) % len(_LOOPS)]


def results_folder(profile: str, results: str = "") -> Path:
    """`results` itself, or results/<profile> of the checkout where it is empty."""
    return Path(results) if results else checkout_root() / "results" / profile


def save_figure(figure: Figure, results: str | Path, name: str) -> Figure:
    """Write the figure to `results`/figures/`name`.png, atomically, and return it.

    A file that holds the same picture already is left alone.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(style()):
        # without the library's version, which would make the file another one
        figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    path = Path(results) / "figures" / f"{name}.png"
    if not (path.is_file() and path.read_bytes() == buffer.getvalue()):
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return figure


def _axes(
    width: float, height: float, columns: int = 1, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **kwargs)[0])


@styled
def text_lengths(documents: Sequence[str], lines: Sequence[str]) -> Figure:
    """Histograms of documents by words and of lines by characters, with the released limit."""
    figure, (left, right) = _axes(8, 2.9, 2)
    words = [len(document.split()) for document in documents]
    characters = [len(line) for line in lines]
    _histogram(left, words, BLUE)
    left.set(xlabel="words in a document", ylabel="documents", title="Documents")
    _histogram(right, characters, GREEN)
    right.axvline(MIN_LINE, color=BLACK, linestyle="--")
    share = sum(c > MIN_LINE for c in characters) / max(len(characters), 1)
    note = f"longer than {MIN_LINE}:\n{share:.0%} of lines"
    right.text(0.97, 0.95, note, ha="right", va="top", transform=right.transAxes)
    right.set(xlabel="characters in a line", ylabel="lines", title="Lines")
    return figure


def _histogram(axes: Axes, values: Sequence[int], color: str) -> None:
    top = np.percentile(values, 99) if len(values) else 1
    axes.hist(np.minimum(values, top), bins=min(50, max(int(top), 1)), color=color)
    axes.margins(y=0.1)


@styled
def line_lengths(panels: Mapping[str, Rows], shares: Mapping[str, float]) -> Figure:
    """Tokens a line, a panel a text: what is cut or padded to the last bin's start.

    `panels` maps a title to rows of `line_length_rows`, `shares` the same titles to padding shares.
    """
    figure, axes = _axes(8, 3, len(panels))
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        counts = np.array([row["lines"] for row in rows])
        starts = np.array([row["shortest"] for row in rows])
        width = starts[1] - starts[0]
        colors = [BLUE if row["longest"] else VERMILION for row in rows]
        ax.bar(starts - 1, counts / counts.sum(), width=width * 0.9, align="edge", color=colors)
        limit = int(starts[-1]) - 1
        ax.axvline(limit, color=BLACK, linestyle="--")
        note = f"every line takes\n{limit} positions:\n{shares[title]:.1%} padding"
        ax.text(limit * 0.97, ax.get_ylim()[1] * 0.97, note, ha="right", va="top")
        ax.set(xlabel="tokens in a line", title=title, xlim=(0, limit + 2 * width))
        ax.xaxis.set_ticks(range(0, limit + 1, limit // 4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes[0].set_ylabel("share of lines")
    return figure


@styled
def bytes_per_token(rows: Rows) -> Figure:
    """Bytes a token of each corpus and tokenizer (vocabulary size), from rows of one split."""
    figure, (ax,) = _axes(8, 0.9 + 0.32 * len(rows))
    names = [f"{r['corpus']}, {r['tokenizer']} ({r['vocab_size']:,})" for r in rows]
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    colors = [_CORPORA[corpora.index(row["corpus"]) % len(_CORPORA)] for row in rows]
    values = [row["bytes_per_token"] for row in rows]
    bars = ax.barh(names, values, color=colors)
    ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    ax.set(xlabel="bytes a token", xlim=(0, max(values) * 1.1))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


@styled
def parts_of_models(models: Mapping[str, Mapping[str, int]], unit: str) -> Figure:
    """Stacked bars, a bar a model: counts by part (of `accounting`), in millions of `unit`."""
    figure, (ax,) = _axes(8, 1.6 + 0.45 * len(models))
    parts = list(dict.fromkeys(part for counts in models.values() for part in counts))
    left = np.zeros(len(models))
    for part in parts:
        widths = np.array([counts.get(part, 0) / 1e6 for counts in models.values()])
        ax.barh(list(models), widths, left=left, color=_PARTS[part], label=part, height=0.6)
        left += widths
    for row, total in enumerate(left):
        ax.annotate(f"{total:.1f} M", (total, row), (4, 0), textcoords="offset points", va="center")
    ax.set(xlabel=f"million {unit}", xlim=(0, left.max() * 1.13))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


@styled
def causality_matrices(reports: Mapping[str, CausalityReport], loop: int) -> Figure:
    """What each changed token moves at the exit of `loop`, a panel a model, on one log scale."""
    figure, axes = _axes(8, 3.9, len(reports), sharey=True)
    matrices = [report.changes[loop].numpy() for report in reports.values()]
    positive = np.concatenate([matrix[matrix > 0] for matrix in matrices])
    if not positive.size:
        raise InputError("no logit moved in any of the models; there is nothing to draw")
    norm = LogNorm(max(positive.min(), positive.max() * 1e-7), positive.max())
    for ax, (title, report), matrix in zip(axes, reports.items(), matrices, strict=True):
        image = ax.imshow(np.ma.masked_equal(matrix, 0), norm=norm, cmap="viridis")
        ax.plot([-0.5, len(matrix) - 0.5], [-0.5, len(matrix) - 0.5], color=VERMILION, linewidth=1)
        verdict = "sees the future" if report.leaks else "nothing above the diagonal"
        ax.set(xlabel="changed token j", title=f"{title}: {verdict}")
        ax.grid(visible=False)
    axes[0].set_ylabel("position t of the logits")
    label = f"largest change of a logit\nat exit {loop} (white: exactly 0)"
    figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    return figure


@styled
def training_curves(metrics: Rows, floor: float | None = None) -> Figure:
    """Loss of every exit against tokens seen: of the training batches, smoothed, and of valid.

    `metrics`: rows of metrics.jsonl; `floor`: a loss no causal model can beat, where it is known.
    """
    figure, axes = _axes(8, 3.2, 2, sharey=True)
    titles = ("Training batches (running mean)", "Validation text")
    unit, word = (1e6, "million") if metrics[-1]["tokens"] >= 1e6 else (1e3, "thousand")
    for ax, prefix, title in zip(axes, ("loss_", "valid_loss_"), titles, strict=True):
        names = {key for row in metrics for key in row if key.startswith(prefix)}
        for loop in sorted(int(name.removeprefix(prefix)) for name in names):
            rows = [row for row in metrics if f"{prefix}{loop}" in row]  # not every update has all
            tokens = np.array([row["tokens"] for row in rows]) / unit
            losses = np.array([row[f"{prefix}{loop}"] for row in rows])
            marker = _MARKERS[(loop - 1) % len(_MARKERS)]
            if prefix == "loss_":
                losses, marker = _running_mean(losses, len(losses) // 50), "None"
            label = f"exit {loop}"
            ax.plot(tokens, losses, color=loop_color(loop), label=label, marker=marker)
        if floor is not None:
            ax.axhline(floor, color=BLACK, linestyle="--", label="entropy rate")
        ax.set(xlabel=f"tokens seen ({word})", title=title)
    axes[0].set_ylabel("loss (nats per token)")
    axes[1].legend()
    return figure


@styled
def same_updates(page: Rows, trained: Rows) -> Figure:
    """Losses by exit and update: those of `page` as points over the lines of `trained`.

    Rows with `update` and `loss_<exit>`; an exit is drawn where an update trained it.
    """
    figure, (ax,) = _axes(6.5, 3.2)
    names = {key for row in trained for key in row if re.fullmatch(r"loss_\d+", key)}
    for loop in sorted(int(name.removeprefix("loss_")) for name in names):
        color, key = loop_color(loop), f"loss_{loop}"
        for rows, options in (
            (trained, {"label": f"exit {loop}", "linewidth": 1.2}),
            (page, {"linestyle": "none", "marker": "o", "markerfacecolor": "none"}),
        ):
            points = [(row["update"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points, strict=True), color=color, **options)
    ax.set(xlabel="update", ylabel="training loss (nats per token)")
    ax.set_title("lines: train(); circles: the loop on the page")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


@styled
def below_the_floor(runs: Mapping[str, Rows], floor: float) -> Figure:
    """The last exit's loss on training batches, a line a run, and the entropy of the text.

    `runs`: metrics by name; `floor`: nats a token that no causal model can score below.
    """
    figure, (ax,) = _axes(6.5, 3.2)
    for (name, metrics), color in zip(runs.items(), (VERMILION, BLUE, GREEN), strict=False):
        last = max(int(key[5:]) for key in metrics[0] if re.fullmatch(r"loss_\d+", key))
        rows = [row for row in metrics if f"loss_{last}" in row]
        losses = _running_mean(np.array([row[f"loss_{last}"] for row in rows]), len(rows) // 50)
        ax.plot([row["tokens"] / 1e3 for row in rows], losses, color=color, label=name)
    ax.axhline(floor, color=BLACK, linestyle="--", label="entropy of the text")
    ax.set(xlabel="tokens seen (thousand)", ylabel="training loss (nats per token)", ylim=(0, None))
    ax.legend()
    return figure


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it."""
    window = max(window, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


@styled
def loss_by_exit(results: Rows) -> Figure:
    """The honest loss of every exit, a panel a split; `results`: rows of results.csv."""
    honest = [row for row in results if row["protocol"] == "honest"]
    splits = list(dict.fromkeys(row["split"] for row in honest))
    figure, axes = _axes(8, 2.8, len(splits), sharey=True)
    for ax, split in zip(axes, splits, strict=True):
        rows = [row for row in honest if row["split"] == split]
        loops, losses = [row["exit"] for row in rows], [row["loss"] for row in rows]
        ax.scatter(loops, losses, s=50, color=[loop_color(loop) for loop in loops])
        for loop, loss in zip(loops, losses, strict=True):
            ax.annotate(
                f"{loss:.3f}", (loop, loss), (0, 6), textcoords="offset points", ha="center"
            )
        ax.set(xlabel="exit after loop", xticks=loops, title=f"{split}, honest protocol")
        ax.margins(x=0.12, y=0.25)
    axes[0].set_ylabel("loss (nats per token)")
    return figure


@styled
def schedule_and_speed(metrics: Rows, timing: Rows) -> Figure:
    """The learning rate and the measured tokens a second, against updates."""
    figure, (left, right) = _axes(8, 2.7, 2)
    rows = [row for row in metrics if "lr" in row]
    left.plot([row["update"] for row in rows], [row["lr"] * 1e3 for row in rows], color=BLUE)
    left.set(xlabel="update", ylabel="learning rate (1e-3)", title="Learning rate")
    updates = [row["update"] for row in timing]
    right.plot(updates, [row["tokens_per_second"] for row in timing], color=GREEN, linewidth=0.8)
    right.set(xlabel="update", ylabel="tokens a second", title="Speed", ylim=(0, None))
    return figure
