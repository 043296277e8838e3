"""The tables of README.md, made from the files under results/: no number there is typed by hand."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crt_lib.compare import compare_arms
from crt_lib.files import InputError, write_text
from crt_lib.ladder import EQUAL_TIME, EQUAL_TOKENS, arms
from crt_lib.runs import load_run, read_rows
from crt_lib.search import documents_file, summarise


def update_readme(readme: Path, results: Path) -> bool:
    """Rewrite the generated blocks of `readme` from `results`; returns whether it changed.

    A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Raises InputError when one
    is missing.
    """
    old = readme.read_text(encoding="utf-8")
    new = render(old, results)
    if new != old:
        write_text(readme, new)
    return new != old


def render(text: str, results: Path) -> str:
    """`text` with every generated block made anew from the files under `results`."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        block = make(results) + "\n"
        text, found = re.subn(pattern, lambda m, b=block: m[1] + b + m[2], text, flags=re.DOTALL)
        if found != 1:
            raise InputError(f"the README has {found} blocks <!-- begin {name} -->; one is needed")
    return text


def small_results(results: Path) -> str:
    """The small profile on WikiText-2: every exit of `crt2`, and the last of the paper's block."""
    runs = {name: _finished_run(results / "small" / name) for name in ("crt2", "paper")}

    def line(name: str, loop: int) -> list[str]:
        part, rows = runs[name]
        return [
            f"`{name}`, loop {loop}",
            f"{part['parameters'] / 1e6:.2f}M",
            _cell(rows, "valid", "honest", loop, "word_ppl"),
            _cell(rows, "test", "honest", loop, "word_ppl"),
            _cell(rows, "test", "honest", loop, "token_ppl"),
            _cell(rows, "test", "honest", loop, "bits_per_byte"),
            _cell(rows, "test", "released", loop, "token_ppl"),
        ]

    loops = {name: sorted({row["exit"] for row in rows}) for name, (_, rows) in runs.items()}
    body = [line("crt2", loop) for loop in loops["crt2"]] + [line("paper", loops["paper"][-1])]
    head = ["exit", "parameters", "valid word PPL", "test word PPL", "test token PPL"]
    head += ["test bits/byte", "test PPL, released protocol"]
    notes = [
        f"`{name}`: {part['seconds'] / 60:.0f} minutes of training, "
        f"{part['data_seen']['tokens'] / 1e6:.1f}M tokens, seed {part['train']['seed']}"
        for name, (part, _) in runs.items()
    ]
    part, rows = runs["crt2"]
    bits = [
        next(
            row["bits_per_byte"]
            for row in rows
            if (row["split"], row["protocol"], row["exit"]) == ("test", "honest", loop)
        )
        for loop in loops["crt2"]
    ]
    gains = ", ".join(f"{a - b:.3f}" for a, b in itertools.pairwise(bits))
    caption = (
        f"\n{part['tokenizer']} tokens of {part['corpus']}, on {part['environment']['device']} "
        f"({part['environment']['torch_threads']} threads). {'; '.join(notes)}. Bits per byte that "
        f"each further loop of `crt2` takes off: {gains}. Last column: the "
        "same causal models scored as the paper scores, padding included."
    )
    return _table(head, body) + "\n" + caption


def _finished_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest's part, with what was seen of the data, and the rows of results.csv."""
    run = load_run(folder)
    if run is None:
        raise InputError(f"no finished run in {folder}; `crt train --profile small --recipe ...`")
    return run.manifest | {"data_seen": {"tokens": run.metrics[-1]["tokens"]}}, run.results


def _cell(rows: list[dict[str, Any]], split: str, protocol: str, loop: int, column: str) -> str:
    (row,) = (r for r in rows if (r["split"], r["protocol"], r["exit"]) == (split, protocol, loop))
    return f"{row[column]:.3f}" if column == "bits_per_byte" else f"{row[column]:.1f}"


def recipe_comparison(results: Path) -> str:
    """`crt2` against the paper's block and GPT-2 of its size: bits per byte, with intervals."""
    path = results / "small" / "search.csv"
    rows, documents = read_rows(path), read_rows(documents_file(path))
    baselines = arms()["baselines"]
    head, body, budgets = ["arm", "parameters"], {}, []
    for title, budget in (("equal tokens", EQUAL_TOKENS), ("equal time", EQUAL_TIME)):
        if all(row["budget"] != budget for row in documents):
            continue
        budgets.append(f"{title}: {budget}")
        head += [f"test bits/byte, {title}", "`crt2` minus it, 95 % interval"]
        tuned = {row["arm"]: row for row in summarise(rows, ["crt2", *baselines], budget)}
        for row in compare_arms(documents, "crt2", baselines, budget):
            name = row["arm"]
            line = body.setdefault(name, [name, f"{tuned[name]['parameters'] / 1e6:.2f}M"])
            line += [""] * (len(head) - 2 - len(line))
            line += [f"{row['bits_per_byte']:.3f}", _difference(row)]
    table = _table(head, [line + [""] * (len(head) - len(line)) for line in body.values()])
    seeds = ", ".join(map(str, sorted({row["seed"] for row in documents})))
    first = next(row for row in rows if row["budget"] == EQUAL_TOKENS)
    tokens = first["tokens"] // first["updates"]
    return f"{table}\n\nSeeds {seeds}; updates of {tokens:,} tokens; {'; '.join(budgets)}."


def _difference(row: dict[str, Any]) -> str:
    if "ours_minus" not in row:
        return ""
    interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if "low" in row else ", one seed"
    return f"{row['ours_minus']:+.3f}{interval}"


def training_benchmark(results: Path) -> str:
    """`crt bench train`, a row a shape: the released-style step against ours."""
    rows = read_rows(results / "bench" / "train.csv")
    body = []
    for released, ours in zip(rows[::2], rows[1::2], strict=True):
        speed = ours["useful_tokens_per_second"] / released["useful_tokens_per_second"]
        memory = ours["peak_memory_bytes"] / released["peak_memory_bytes"]
        body.append(
            [
                f"{ours['rows']} x {ours['seq_len']}",
                ours["precision"],
                _pair(released, ours, "useful_tokens_per_second", 1, "{:.1f}"),
                f"{speed:.2f}x",
                _pair(released, ours, "peak_memory_bytes", 1e9, "{:.2f}"),
                f"{memory:.2f}x",
                _pair(released, ours, "mfu", 0.01, "{:.0f} %"),
            ]
        )
    head = ["step", "ours in", "useful tokens/s", "ratio", "peak GB", "ratio", "MFU"]
    where = f"{rows[0]['device']}, {rows[0]['threads']} threads"
    return _table(head, body) + f"\n\nReleased-style -> ours, {where}."


BLOCKS: dict[str, Callable[[Path], str]] = {
    "small": small_results,
    "recipe": recipe_comparison,
    "bench": training_benchmark,
}


def _pair(a: dict[str, Any], b: dict[str, Any], key: str, unit: float, form: str) -> str:
    return f"{form.format(a[key] / unit)} -> {form.format(b[key] / unit)}"


def _table(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
