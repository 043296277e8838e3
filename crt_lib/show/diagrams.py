"""Diagrams for the notebooks: the architecture of a configuration, and what a batch holds."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED, Batch
from crt_lib.show.plots import BLACK, GREY, SKY, VERMILION, loop_color, styled

_TEXT, _PADDING, _UNSCORED = "#cfe6f5", "#f6d3c1", "#eeeeee"


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
    _box(ax, 3.5, 28.5, 19, 4.5, "token ids  (B, T)", BLACK)
    _box(ax, 3.5, 37, 19, 5, f"embedding\n{config.vocab_size:,} × {d // 2}", GREY)
    _box(ax, 3.5, 46, 19, 5, f"linear  {d // 2} → {d}", GREY)
    _box(ax, 3.5, 55, 19, 6, _cycles(config, config.n_embed_cycles), VERMILION)
    for low, high in ((33, 37), (42, 46), (51, 55)):
        _arrow(ax, (13, low), (13, high))
    # out of the embedding, past its frame, into the block from below
    ax.plot([22.5, 28.5, 28.5], [58, 58, 30.5], color=BLACK, linewidth=1.2)
    ax.text(29.3, 46, "+ positions", rotation=90, va="center", fontsize=8)
    _arrow(ax, (28.5, 30.5), (37, 30.5))


def _block(ax: Axes, config: ModelConfig) -> None:
    title = f"one block, applied {config.n_loops} times (eq. 3)"
    _frame(ax, 32.5, 26, 29.5, 38, title, SKY)
    _box(ax, 37, 28.5, 20, 4.5, "+ loop encoding $e_\\ell$", SKY)
    heads = f"attention, causal\n{config.n_heads} heads of {config.d_model // config.n_heads}"
    _box(ax, 37, 36, 20, 5.5, heads, SKY)
    add = "add" if config.norm == "none" else f"add, {config.norm} norm"
    _box(ax, 37, 44, 20, 3.5, add, SKY)
    _box(ax, 37, 50, 20, 6, _cycles(config, config.n_cycles), VERMILION)
    _box(ax, 37, 58.3, 20, 3.2, add, SKY)
    for low, high in ((33, 36), (41.5, 44), (47.5, 50), (56, 58.3)):
        _arrow(ax, (47, low), (47, high))
    for low, high in ((34.4, 45.75), (48.6, 59.9)):  # the two residual connections
        ax.plot([47, 35, 35], [low, low, high], color=BLACK, linewidth=0.9)
        _arrow(ax, (35, high), (37, high), width=0.9)
    ax.plot([57, 59.5, 59.5], [59.3, 59.3, 30.75], color=BLACK, linewidth=2)
    _arrow(ax, (59.5, 30.75), (57, 30.75), color=BLACK, width=2)
    ax.text(60.8, 45, f"loop  $\\ell$ = 1 … {config.n_loops}", rotation=90, va="center",
            ha="center", fontsize=8, color=BLACK)  # fmt: skip


def _heads(ax: Axes, config: ModelConfig) -> None:
    _frame(ax, 67, 26, 22, 38, "heads (logits, B × T × V)", BLACK)
    loops = config.head_loops
    step = 34 / len(loops)
    ax.plot([57, 64.5], [60.6, 60.6], color=BLACK, linewidth=1.2)
    centers = [28 + step * (i + 0.5) for i in range(len(loops))]
    ax.plot([64.5, 64.5], [centers[0], max(60.6, centers[-1])], color=BLACK, linewidth=1.2)
    for loop, y in zip(loops, centers, strict=True):
        height = min(6.0, step * 0.75)
        text = f"head of loop {loop}" if step < 6 else f"head of loop {loop}\n{_head(config, loop)}"
        _box(ax, 69.5, y - height / 2, 17, height, text, loop_color(loop))
        _arrow(ax, (64.5, y), (69.5, y))


def _head(config: ModelConfig, loop: int) -> str:
    d, size = config.d_model, f"{config.vocab_size:,}"
    match config.head_sharing:
        case "tied":
            return f"{d} → {d // 2}, embedding$^T$"
        case "shared_aux":
            return f"{d} → {size}, " + ("own" if loop == config.n_loops else "shared")
    return f"{d} → {size}"


def _cycle(ax: Axes, config: ModelConfig) -> None:
    steps = _cycle_steps(config)
    _frame(ax, 1, 2, 88, 20, "one TRM cycle (eq. 2), dilation δ of its own", VERMILION)
    ax.text(3, 10.5, "h", ha="center", va="center", fontsize=11, style="italic")
    gap, left, right = 2.2, 6.0, 80.0
    shares = [1.6 if "kernel" in text else 1.0 for text in steps]
    unit = min(11.0, (right - left - gap * (len(steps) - 1)) / sum(shares))
    x, before = left, 4.0
    for text, share in zip(steps, shares, strict=True):
        width = unit * share
        _arrow(ax, (before, 10.5), (x, 10.5))
        _box(ax, x, 6, width, 9, text, VERMILION)
        before, x = x + width, x + width + gap
    _arrow(ax, (before, 10.5), (82.5, 10.5))
    ax.text(84, 10.5, "+", ha="center", va="center", fontsize=13)
    _arrow(ax, (85.3, 10.5), (88, 10.5))
    ax.plot([3, 3, 84, 84], [12, 17.5, 17.5, 12.5], color=BLACK, linewidth=0.9)


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
    for face, alpha, edge in ((color, 0.16, "none"), ("none", 1.0, color)):
        ax.add_patch(
            FancyBboxPatch((x, y), w, h, shape, facecolor=face, alpha=alpha, edgecolor=edge)
        )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8, linespacing=1.25)


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = BLACK,
    width: float = 1.2,
) -> None:
    properties = {"arrowstyle": "-|>", "color": color, "linewidth": width}
    ax.annotate("", end, start, arrowprops=properties | {"shrinkA": 0, "shrinkB": 0})


@styled
def batch_pictures(batches: Mapping[str, Batch], words: Sequence[str], eot_id: int) -> Figure:
    """Each batch as a grid: the input word in a cell, the colour says what its target is.

    `words[i]` is shown for token id i; a target equal to `eot_id` counts as padding.
    """
    heights = [len(batch.inputs) + 0.9 for batch in batches.values()]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(batches), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, batch) in zip(axes, batches.items(), strict=True):
        for row, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
            for column, (token, target) in enumerate(
                zip(inputs.tolist(), targets.tolist(), strict=True)
            ):
                face = {NOT_SCORED: _UNSCORED, eot_id: _PADDING}.get(target, _TEXT)
                cell = Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white")
                ax.add_patch(cell)
                text = "" if token == eot_id and column else words[token]
                ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7.5)
        rows, columns = batch.inputs.shape
        ax.set(xlim=(0, columns), ylim=(rows, 0), title=title)
        ax.axis("off")
    handles = [
        Patch(color=_TEXT, label="the next word is scored"),
        Patch(color=_PADDING, label="padding is scored"),
        Patch(color=_UNSCORED, label="nothing is scored"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure
