"""Diagrams for the notebooks: the architecture of a configuration, and what a batch holds."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path

from crt_lib.audit.report import CausalityReport
from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED, Batch
from crt_lib.exits.perloop import Lens
from crt_lib.files import InputError
from crt_lib.show.plots import BLACK, GREY, SKY, VERMILION, loop_color, panels, styled


@styled
def architecture(config: ModelConfig) -> Figure:
    """Figure 1 of the paper for `config`: embedding, the one block and its loop, the heads.

    The strip at the bottom is one TRM cycle (eq. 2), of which both TRMs are made.
    """
    figure = Figure(figsize=(9, 6.6))
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.set(xlim=(0, 90), ylim=(0, 66))
    ax.axis("off")
    _embedding(ax, config)
    _block(ax, config)
    _heads(ax, config)
    _cycle(ax, config)
    return figure


def _embedding(ax: Axes, config: ModelConfig) -> None:
    d = config.d_model
    _frame(ax, 1, 26, 24, 38, "TRM embedding (eq. 1)", GREY)
    boxes = [
        (28.5, 4.5, "token ids  (B, T)", BLACK),
        (37, 5, f"embedding\n{config.vocab_size:,} × {d // 2}", GREY),
        (46, 5, f"linear  {d // 2} → {d}", GREY),
        (55, 6, _cycles(config, config.n_embed_cycles), VERMILION),
    ]
    _tower(ax, 3.5, 19, boxes)
    _arrow(ax, (22.5, 58), (28.5, 58), (28.5, 30.5), (37, 30.5))
    ax.text(29.3, 46, "+ positions", rotation=90, va="center", fontsize=8)


def _block(ax: Axes, config: ModelConfig) -> None:
    title = f"one block, applied {config.n_loops} times (eq. 3)"
    _frame(ax, 32.5, 26, 29.5, 38, title, SKY)
    heads = f"{config.n_heads} heads of {config.d_model // config.n_heads}"
    add = "add" if config.norm == "none" else f"add, {config.norm} norm"
    boxes = [
        (28.5, 4.5, "+ loop encoding $e_\\ell$", SKY),
        (36, 5.5, f"attention, causal\n{heads}", SKY),
        (44, 3.5, add, SKY),
        (50, 6, _cycles(config, config.n_cycles), VERMILION),
        (58.3, 3.2, add, SKY),
    ]
    _tower(ax, 37, 20, boxes)
    for low, high in ((34.4, 45.75), (48.6, 59.9)):  # the two residual connections
        _arrow(ax, (47, low), (35, low), (35, high), (37, high), width=0.9)
    _arrow(ax, (57, 59.3), (59.5, 59.3), (59.5, 30.75), (57, 30.75), width=2)
    said = f"loop  $\\ell$ = 1 … {config.n_loops}"
    ax.text(60.8, 45, said, rotation=90, va="center", ha="center", fontsize=8)


def _heads(ax: Axes, config: ModelConfig) -> None:
    _frame(ax, 67, 26, 22, 38, "heads (logits, B × T × V)", BLACK)
    step = 34 / len(config.head_loops)
    for place, loop in enumerate(config.head_loops):
        y, height = 28 + step * (place + 0.5), min(6.0, step * 0.75)
        text = f"head of loop {loop}" if step < 6 else f"head of loop {loop}\n{_head(config, loop)}"
        _box(ax, 69.5, y - height / 2, 17, height, text, loop_color(loop))
        _arrow(ax, (57, 60.6), (64.5, 60.6), (64.5, y), (69.5, y))


def _head(config: ModelConfig, loop: int) -> str:
    d, own = config.d_model, f"{config.d_model} → {config.vocab_size:,}"
    shared = f"{own}, {'own' if loop == config.n_loops else 'shared'}"
    kinds = {"tied": f"{d} → {d // 2}, embedding$^T$", "shared_aux": shared}
    return kinds.get(config.head_sharing, own)


def _cycle(ax: Axes, config: ModelConfig) -> None:
    steps = _cycle_steps(config)
    _frame(ax, 1, 2, 88, 20, "one TRM cycle (eq. 2), dilation δ of its own", VERMILION)
    ax.text(3, 10.5, "h", ha="center", va="center", fontsize=11, style="italic")
    gap, left, right = 2.2, 6.0, 80.0
    shares = [1.6 if "kernel" in text else 1.0 for text in steps]
    unit = min(11.0, (right - left - gap * (len(steps) - 1)) / sum(shares))
    x, before = left, 4.0
    for text, share in zip(steps, shares, strict=True):
        _arrow(ax, (before, 10.5), (x, 10.5))
        _box(ax, x, 6, unit * share, 9, text, VERMILION)
        before, x = x + unit * share, x + unit * share + gap
    _arrow(ax, (before, 10.5), (82.5, 10.5))
    ax.text(84, 10.5, "+", ha="center", va="center", fontsize=13)
    _arrow(ax, (85.3, 10.5), (88, 10.5))
    _arrow(ax, (3, 12), (3, 17.5), (84, 17.5), (84, 12.5), width=0.9)


def _cycle_steps(config: ModelConfig) -> list[str]:
    d, wide = config.d_model, config.mlp_ratio * config.d_model
    pads = "pads left" if config.causal else "pads both sides"
    conv = f"conv\nkernel {config.kernel_size}, dilation δ\n{pads}"
    steps = []
    if config.trm in ("depthwise_mlp", "depthwise"):
        steps += [f"depthwise {conv}", "gelu", f"pointwise\n{d} → {d}"]
    elif config.trm in ("conv", "conv_linear"):
        steps += [f"full {conv}", "gelu"]
    if config.norm != "none":
        steps.append(f"{config.norm} norm")
    if config.trm in ("depthwise_mlp", "linear", "conv_linear"):
        steps += [f"linear\n{d:,} → {wide:,}", "gelu", f"linear\n{wide:,} → {d:,}"]
    return steps


def _cycles(config: ModelConfig, count: int) -> str:
    if not count:
        return "no TRM cycle"
    dilations = [config.dilations[i % len(config.dilations)] for i in range(count)]
    listed = ", ".join(map(str, dilations if count <= 8 else [*dilations[:6], "…"]))
    weights = ", one set of weights" if config.share_cycle_weights else ""
    plural = "s" if count > 1 else ""
    return f"{count} TRM cycle{plural}{weights}\ndilation{plural} {listed}"


def _frame(ax: Axes, x: float, y: float, w: float, h: float, title: str, color: str) -> None:
    shape = "round,pad=0,rounding_size=1.2"
    ax.add_patch(FancyBboxPatch((x, y), w, h, shape, facecolor="none", edgecolor=color, ls="--"))
    ax.text(x + w / 2, y + h - 0.9, title, ha="center", va="top", fontsize=8.5)


def _box(ax: Axes, x: float, y: float, w: float, h: float, text: str, color: str) -> None:
    shape = "round,pad=0,rounding_size=0.7"
    ax.add_patch(FancyBboxPatch((x, y), w, h, shape, facecolor=(color, 0.16), edgecolor=color))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8, linespacing=1.25)


def _tower(ax: Axes, x: float, w: float, boxes: list[tuple[float, float, str, str]]) -> None:
    """Boxes from the lowest up, each y, height, text and colour, with arrows between them."""
    for y, height, text, color in boxes:
        _box(ax, x, y, w, height, text, color)
    for (y, height, *_), (above, *_) in itertools.pairwise(boxes):
        _arrow(ax, (x + w / 2, y + height), (x + w / 2, above))


def _arrow(ax: Axes, *points: tuple[float, float], width: float = 1.2) -> None:
    """A line through the points that ends in an arrow."""
    path = Path(points)
    look: dict[str, Any] = {"facecolor": BLACK, "edgecolor": BLACK, "linewidth": width}
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=8, **look))


@styled
def batch_pictures(batches: Mapping[str, Batch], words: Sequence[str], eot_id: int) -> Figure:
    """Each batch as a grid: the input word in a cell, the colour says what its target is.

    `words[i]` is shown for token id i; a target equal to `eot_id` counts as padding.
    """
    kinds = {"the next word is scored": "#cfe6f5", "padding is scored": "#f6d3c1"}
    kinds["nothing is scored"] = "#eeeeee"
    heights = [len(batch.inputs) + 0.9 for batch in batches.values()]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(batches), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, batch) in zip(axes, batches.items(), strict=True):
        inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
        kind = np.select([targets == NOT_SCORED, targets == eot_id], [2, 1], 0)
        colors = ListedColormap(list(kinds.values()))
        ax.pcolormesh(kind, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=1)
        for (row, column), token in np.ndenumerate(inputs):
            text = "" if token == eot_id and column else words[token]
            ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7.5)
        ax.set_title(title)
        ax.invert_yaxis()
        ax.axis("off")
    handles = [Patch(color=color, label=kind) for kind, color in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def causality_matrices(reports: Mapping[str, CausalityReport], loop: int) -> Figure:
    """What each changed token moves at the exit of `loop`, a panel a model, on one log scale."""
    says = {True: "sees the future", False: "nothing above the diagonal"}
    titles = [f"{title}: {says[report.leaks]}" for title, report in reports.items()]
    figure, axes = panels(8, 3.9, titles, sharey=True)
    changes = np.stack([report.changes[loop].numpy() for report in reports.values()])
    positive = changes[changes > 0]
    if not positive.size:
        raise InputError("no logit moved in any of the models; there is nothing to draw")
    norm = LogNorm(max(positive.min(), positive.max() * 1e-7), positive.max())
    for ax, matrix in zip(axes, changes, strict=True):
        image = ax.imshow(np.ma.masked_equal(matrix, 0), norm=norm, cmap="viridis")
        ax.axline((0, 0), slope=1, color=VERMILION, linewidth=1)
        ax.set(xlabel="changed token j")
        ax.grid(visible=False)
    axes[0].set_ylabel("position t of the logits")
    label = f"largest change of a logit\nat exit {loop} (white: exactly 0)"
    figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    return figure


@styled
def lens(seen: Lens, length: int = 8) -> Figure:
    """What each loop guesses after each of the first tokens: its text on the probability it has."""
    shown = seen.probabilities[:, :length]
    loops, columns = shown.shape
    follow = seen.tokens[1 : columns + 1]
    first, last = (sum(map(str.__eq__, seen.guesses[i], follow)) for i in (0, -1))
    title = (
        f"Right guesses (bold): {first} of {len(follow)} after loop 1, {last} after loop {loops}"
    )
    figure, (ax,) = panels(1.0 * columns + 1, 0.5 * loops + 1.4, (title,))
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shown):
        guess = seen.guesses[i][j]
        look: dict[str, Any] = {"color": "white" if share > 0.6 else BLACK, "fontsize": 14}
        weight = "bold" if follow[j : j + 1] == [guess] else "normal"
        ax.text(j, i, _shown(guess), ha="center", va="center", fontweight=weight, **look)
    ax.set_xticks(range(columns), map(_shown, seen.tokens[:columns]), fontsize=14)
    ax.set_yticks(range(loops), [f"loop {loop}" for loop in range(1, loops + 1)], fontsize=14)
    ax.set_xlabel("after the token", fontsize=14)
    ax.title.set_fontsize(14)
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="probability of the guess")
    return figure


@styled
def staircases(tables: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Percent of right answers, loops down and look-ups across, a panel for each table's title."""
    figure, axes = panels(2.5 * len(tables), 3.9, tables, above=title, sharey=True)
    for ax, shares in zip(axes, tables.values(), strict=True):
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), share in np.ndenumerate(shares.to_numpy()):
            look: dict[str, Any] = {"color": "white" if share > 0.6 else BLACK, "fontsize": 13}
            ax.text(j, i, f"{100 * share:.0f}", ha="center", va="center", **look)
        ax.set_xticks(range(shares.shape[1]), list(shares.columns), fontsize=12)
        ax.set_yticks(range(shares.shape[0]), list(shares.index), fontsize=12)
        ax.set_xlabel("look-ups needed", fontsize=12)
        ax.set_title(ax.get_title("left"), fontsize=12)
        ax.grid(visible=False)
    axes[0].set_ylabel("loop", fontsize=12)
    return figure


def _shown(token: str) -> str:
    return token.replace("\n", "\\n").replace("$", r"\$").strip(" ") or "_"
