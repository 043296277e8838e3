"""The pages: blocks of them are made from the files under results/, no number is typed by hand."""

import re
from collections.abc import Callable
from pathlib import Path

from crt_lib.files import InputError, write_text
from crt_lib.show import demo, notebooks, timed, trained
from crt_lib.show.arenas import arena_tables, looping_headline
from crt_lib.show.templates import render
from crt_lib.study.claims import judge_claims, summary

HEADLINES = ["C01", "C06", "C08", "C12", "C20"]  # what the paper's title and abstract rest on


def update_page(page: Path, results: Path) -> bool:
    """Rewrite the blocks of a page from `results`; returns whether it changed.

    A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, NAME one of BLOCKS. Raises
    InputError where the end is missing.
    """
    old = page.read_text(encoding="utf-8")

    def made(found: re.Match[str]) -> str:
        if not found["end"]:
            raise InputError(f"{page} has {found['begin'].strip()} without its end")
        return f"{found['begin']}{BLOCKS[found['name']](results)}\n{found['end']}"

    begin = rf"(?P<begin><!-- begin (?P<name>{'|'.join(BLOCKS)}) -->\n)"
    block = rf"{begin}(?:.*?(?P<end><!-- end (?P=name) -->))?"
    text = re.sub(block, made, old, flags=re.DOTALL)
    if text != old:
        write_text(page, text)
    return text != old


def claims_summary(results: Path) -> str:
    """The ledger's counts, and the rows that the paper's title and abstract rest on."""
    rows = judge_claims(results)
    by_id = {row["id"]: row for row in rows}
    shown = [by_id[name] for name in HEADLINES]
    return render("claims", shown=shown, summary=summary(rows), losses=by_id["C06"])


BLOCKS: dict[str, Callable[[Path], str]] = {
    "files": notebooks.files,
    "claims": claims_summary,
    "small": trained.small_results,
    "recipe": trained.recipe_comparison,
    "words": trained.words,
    "arenas": arena_tables,
    "distilled": demo.distilled,
    "missed": demo.missed_bars,
    "exits": demo.exits_headline,
    "looping": looping_headline,
    "bench": timed.training_benchmark,
    "step": timed.costliest_operations,
    "cost": timed.cost_against_size,
    "decode": timed.decoding,
    "assisted": timed.assisted,
    "card": demo.model_card,
    "notebooks": notebooks.notebook_table,
    "lessons": notebooks.lessons,
    "ways": notebooks.ways_in,
    "fixed": trained.fixed_and_cost,
}
PAGES = ("README.md", "results/README.md", "MODEL_CARD.md")
