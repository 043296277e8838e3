"""The audit's report as one page of HTML: nothing is fetched, and what a model says is escaped."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.checks import Check
from crt_lib.audit.probes import Finding
from crt_lib.audit.reach import of_the_long_row
from crt_lib.audit.report import CausalityReport, rendered

CELLS = 48  # of a picture's side, at most
PICTURES = {"tokens": "each token changed in turn", "far": "all from j on changed"}


def html_page(report: CausalityReport, name: str, checks: Sequence[Check] = ()) -> str:
    """The report on the model called `name`: verdict, evidence, what was covered, what to mend.

    `checks`: further verdicts, which stand below the first.
    """
    pictures = []
    for probe, said in PICTURES.items():
        by_exit = {} if report.random == "own" else report.findings.get(probe, {})
        if by_exit:
            found = by_exit[last := max(by_exit)]
            seen = of_the_long_row(found) if probe == "far" else found
            pictures.append((said, last, *_picture(seen)))
    shown = {"report": report, "name": name, "pictures": pictures, "checks": checks}
    return rendered("page.html", **shown) + "\n"


def _picture(found: Finding) -> tuple[Any, list[tuple[int, int, bool, float]]]:
    """How many rows (a position t of the logits) and columns (a changed position j) it has.

    And its cells: row, column, whether it leaks, and how far up a logarithmic scale it is.
    """
    moved, forbidden = _pooled(found.influence), _pooled(found.influence * found.forbidden())
    top = float(moved.max()) or 1.0
    bottom = max(found.tolerance, top * 1e-7, 1e-30)
    leaks = forbidden > found.tolerance
    share = (torch.where(leaks, forbidden, moved).clamp(min=bottom) / bottom).log()
    opacity = 0.25 + 0.75 * (share / max(math.log(top / bottom), 1e-9)).clamp(max=1.0)
    shown = (leaks | (moved > bottom)).nonzero().tolist()
    cells = [(t, j, bool(leaks[t, j]), float(opacity[t, j])) for t, j in shown]
    return tuple(moved.shape), cells


def _pooled(matrix: Tensor) -> Tensor:
    """The largest of each cell of at most `CELLS` by `CELLS`."""
    size = [min(side, CELLS) for side in matrix.shape]
    finite = matrix.nan_to_num(posinf=torch.finfo(torch.float32).max)
    return F.adaptive_max_pool2d(finite[None], size)[0].double()
