"""The audit's report as one page of HTML: nothing is fetched, and what a model says is escaped."""

import math
from html import escape

import torch
from torch import Tensor

from crt_lib.audit.advice import advice_for
from crt_lib.audit.probes import Finding
from crt_lib.audit.reach import of_the_long_row
from crt_lib.audit.report import CausalityReport

CELLS = 48  # of a picture's side, at most
_SIZE = 8  # pixels of a cell
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .1em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr.leaks td { background: #f6d3c1; }
pre { background: #f4f4f4; padding: .5em; overflow-x: auto; } figure { margin: 1em 0; }
.verdict { font-size: 1.4em; padding: .4em .6em; border-left: .4em solid; }
.clean { border-color: #0072b2; } .leak { border-color: #d55e00; }
"""


def html_page(report: CausalityReport, name: str) -> str:
    """The report on the model called `name`: verdict, evidence, what was covered, what to mend."""
    kind = "leak" if report.leaks else "clean"
    parts = [f"<h1>Audit of {escape(name)}</h1>"]
    parts.append(f'<p class="verdict {kind}">{escape(report.verdict)}</p>')
    if report.example is not None:
        parts.append(f"<p>For example, {escape(str(report.example))}.</p>")
    parts += ["<h2>Which token moves which logits</h2>", *_pictures(report)]
    parts += ["<h2>Evidence</h2>", _table(report)]
    covered = [f"{key}: {said}" for key, said in report.covered.items()]
    if report.power is not None:
        covered.append(f"two-sample test: {report.power}")
    not_asked = [f"{key}: {why}" for key, why in report.left_out.items()]
    for title, said in (
        ("Covered", covered),
        ("Not asked", not_asked),
        ("Not excluded", report.not_excluded),
    ):
        items = "".join(f"<li>{escape(one)}</li>" for one in said)
        parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    if report.leaks:
        parts.append("<h2>How to fix it</h2>")
        for cause, code in advice_for(report.convicting):
            parts.append(f"<p>{escape(cause)}</p><pre>{escape(code)}</pre>")
    head = f'<meta charset="utf-8"><title>Audit of {escape(name)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"


def _table(report: CausalityReport) -> str:
    rows = ["<tr><th>probe<th>exit<th>leaking pairs<th>nearest<th>furthest<th>largest</tr>"]
    for row in report.rows():
        cells = [row["probe"], row["exit"], row["pairs"], row["nearest"], row["furthest"]]
        texts = ["-" if cell is None else str(cell) for cell in cells] + [f"{row['largest']:.1e}"]
        leaks = ' class="leaks"' if row["pairs"] else ""
        rows.append(f"<tr{leaks}>" + "".join(f"<td>{escape(text)}" for text in texts) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _pictures(report: CausalityReport) -> list[str]:
    drawn = []
    for probe, said in (("tokens", "each token changed in turn"), ("far", "all from j on changed")):
        by_exit = {} if report.random == "own" else report.findings.get(probe, {})
        if by_exit:
            loop = max(by_exit)
            exit_ = f", exit {loop}" if loop else ""
            found = of_the_long_row(by_exit[loop]) if probe == "far" else by_exit[loop]
            caption = f"{said}{exit_}: red is the future, blue is not; white moves nothing"
            drawn.append(f"<figure>{picture(found)}<figcaption>{caption}</figcaption>")
            drawn.append("</figure>")
    return drawn or ["<p>No token could be changed.</p>"]


def picture(found: Finding) -> str:
    """SVG of an influence: a row a position t of the logits, a column a changed position j."""
    influence, forbidden = _pooled(found.influence), _pooled(found.influence * found.forbidden())
    top = float(influence.max()) or 1.0
    bottom = max(found.tolerance, top * 1e-7, 1e-30)
    width, height = (side * _SIZE for side in reversed(influence.shape))
    cells = []
    for t, row in enumerate(influence.tolist()):
        for j, moved in enumerate(row):
            leaks = float(forbidden[t, j]) > found.tolerance
            if moved > bottom or leaks:
                value = float(forbidden[t, j]) if leaks else moved
                share = math.log(max(value, bottom) / bottom) / max(math.log(top / bottom), 1e-9)
                color = "#d55e00" if leaks else "#0072b2"
                cells.append(
                    f'<rect x="{j * _SIZE}" y="{t * _SIZE}" width="{_SIZE}" height="{_SIZE}" '
                    f'fill="{color}" fill-opacity="{0.25 + 0.75 * min(share, 1.0):.2f}"/>'
                )
    axes = (
        f'<text x="{20 + width / 2:.0f}" y="{height + 16}" text-anchor="middle">'
        "changed token j</text>"
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "position t of the logits</text>"
    )
    frame = f'<rect width="{width}" height="{height}" fill="none" stroke="#999"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 24}" height="{height + 24}" '
        f'font-size="12" role="img">{axes}<g transform="translate(20 0)">{"".join(cells)}{frame}'
        "</g></svg>"
    )


def _pooled(matrix: Tensor) -> Tensor:
    """The largest of each cell of at most `CELLS` by `CELLS`."""
    size = [min(side, CELLS) for side in matrix.shape]
    finite = matrix.nan_to_num(posinf=torch.finfo(torch.float32).max)
    return torch.nn.functional.adaptive_max_pool2d(finite[None], size)[0]
