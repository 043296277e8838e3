"""Templates filled with what was measured: the blocks of pages, and the parts of the explorer."""

import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd


def said(number: Any, form: str, unit: float = 1) -> str:
    """A number, in `unit`, as `form` says it; nothing where there is none."""
    return "" if pd.isna(number) else form.format(number if unit == 1 else number / unit)


def html(part: str, **values: Any) -> str:
    """The template of a part of the explorer with these values, escaped unless it says `safe`."""
    return _TEMPLATES.get_template(f"{part}.html").render(values)


def render(block: str, **values: Any) -> str:
    """The template of a block with these values.

    Its lines are joined to paragraphs and rows of tables: a line begins anew after an empty one,
    and where it starts with `|`.
    """
    text = _TEMPLATES.get_template(f"{block}.md.j2").render(values).strip()
    return re.sub(r"(?<!\n)\n(?![\n|])", " ", text)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader([Path(__file__).with_name(of) for of in ("blocks", "page")]),
    autoescape=jinja2.select_autoescape(),  # of HTML alone
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["f"] = said
_TEMPLATES.globals["expm1"] = np.expm1
