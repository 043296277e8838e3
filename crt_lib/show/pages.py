"""The pages: blocks of them are made from the files under results/, no number is typed by hand."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from crt_lib.files import InputError, write_text
from crt_lib.show import claims, demo, notebooks, timed, trained
from crt_lib.show.arenas import arena_tables, looping_headline


def update_page(page: Path, results: Path, blocks: Sequence[str]) -> bool:
    """Rewrite these generated blocks of a page from `results`; returns whether it changed.

    A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Raises InputError when one
    is missing.
    """
    old = text = page.read_text(encoding="utf-8")
    for name in blocks:
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        parts = re.split(f"{begin}|{end}", text)
        if len(parts) != 3:
            raise InputError(f"{page} needs one block {begin.strip()} ... {end}")
        text = f"{parts[0]}{begin}{BLOCKS[name](results)}\n{end}{parts[2]}"
    if text != old:
        write_text(page, text)
    return text != old


BLOCKS: dict[str, Callable[[Path], str]] = {
    "files": notebooks.files,
    "claims": claims.claims_summary,
    "small": trained.small_results,
    "recipe": trained.recipe_comparison,
    "words": trained.words,
    "arenas": arena_tables,
    "distilled": demo.distilled,
    "exits": demo.exits_headline,
    "looping": looping_headline,
    "bench": timed.training_benchmark,
    "step": timed.costliest_operations,
    "cost": timed.cost_against_size,
    "decode": timed.decoding,
    "card": demo.model_card,
    "notebooks": notebooks.notebook_table,
    "lessons": notebooks.lessons,
    "ways": notebooks.ways_in,
    "fixed": trained.fixed_and_cost,
}
PAGES = {  # page -> the names of its blocks
    "README.md": ("fixed", "claims", "exits", "looping", "ways", "lessons", "notebooks"),
    "results/README.md": (
        "small",
        "recipe",
        "words",
        "arenas",
        "bench",
        "step",
        "cost",
        "decode",
        "distilled",
        "files",
    ),
    "MODEL_CARD.md": ("card",),
}
