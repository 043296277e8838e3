"""The exit explorer's picture: the frontier with a policy's place on it, and where tokens exit."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Outcome, Trace, apply_policy, oracle
from crt_lib.show import plots
from crt_lib.show.figures import Rows, draw_curves


@plots.styled
def exit_view(
    loops: Sequence[int], curves: Mapping[str, Rows], outcome: Outcome, criterion: str | None
) -> Figure:
    """The explorer's picture: the frontier with the current point, and where tokens exit."""
    figure, axes = _exit_panels(loops, curves, criterion)
    _mark(axes, loops, outcome)
    return figure


class ExitPicture:
    """`exit_view` as PNG of one outcome of a trace after another: what they share is drawn once.

    The axes have room for the oracle and the fixed exits, so for all between them.
    """

    @plots.styled
    def __init__(self, trace: Trace, curves: Mapping[str, Rows], criterion: str | None):
        self.loops = trace.loops
        figure, self.axes = _exit_panels(self.loops, curves, criterion)
        left, _ = self.axes
        fixed = (apply_policy(trace, Policy(fixed=loop)) for loop in self.loops)
        left.update_datalim([_place(outcome) for outcome in (oracle(trace), *fixed)])
        left.autoscale_view()
        left.autoscale(False)
        figure.set_dpi(80)
        self.canvas = FigureCanvasAgg(figure)
        self.canvas.draw()
        self.shared = self.canvas.copy_from_bbox(figure.bbox)

    @plots.styled
    def png(self, outcome: Outcome, *beside: Outcome) -> bytes:
        """The picture with this outcome, and hollow points for those `beside` it."""
        self.canvas.restore_region(self.shared)
        for artist in (
            *(self._hollow(*_place(other)) for other in beside),
            *_mark(self.axes, self.loops, outcome),
        ):
            self.canvas.figure.draw_artist(artist)
            artist.remove()
        file = io.BytesIO()
        imsave(file, self.canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()

    def _hollow(self, x: float, y: float) -> Artist:
        black = plots.BLACK
        return self.axes[0].scatter(x, y, facecolors="none", edgecolors=black, marker="D", zorder=4)


def _exit_panels(
    loops: Sequence[int], curves: Mapping[str, Rows], criterion: str | None
) -> tuple[Figure, list[Axes]]:
    figure, (left, right) = plots.panels(9.5, 3.0, ("", ""), width_ratios=(3, 2))
    draw_curves(left, curves, criterion)
    left.legend(fontsize=9, ncols=2)
    right.bar([f"loop {loop}" for loop in loops], 0)
    right.set(ylabel="share of the tokens", ylim=(0, 1.1))
    return figure, [left, right]


def _mark(axes: Sequence[Axes], loops: Sequence[int], outcome: Outcome) -> list[Artist]:
    """The point and the bars of `outcome`."""
    left, right = axes
    point = left.scatter(*_place(outcome), c=plots.BLACK, marker="D", zorder=4)
    names, colors = [f"loop {loop}" for loop in loops], [plots.loop_color(loop) for loop in loops]
    bars = right.bar(names, outcome.shares, color=colors)
    return [point, *bars, *right.bar_label(bars, fmt="{:.0%}")]


def _place(outcome: Outcome) -> tuple[float, float]:
    return outcome.multiply_adds / 1e6, outcome.token_ppl
