"""The tables of README.md, made from the files under results/: no number there is typed by hand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, write_text
from crt_lib.manifest import read_training
from crt_lib.runs import read_rows


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
    """The small profile on WikiText-2, an exit a row: the honest protocol and the released one."""
    part = read_training(results / "small")
    if part is None or part["status"] != "done":
        raise InputError(f"no finished run in {results / 'small'}; `crt train --profile small`")

    rows = read_rows(results / "small" / "results.csv")

    def cell(split: str, protocol: str, exit_loop: int, column: str) -> str:
        (row,) = (
            row
            for row in rows
            if (row["split"], row["protocol"], row["exit"]) == (split, protocol, exit_loop)
        )
        return f"{row[column]:.3f}" if column == "bits_per_byte" else f"{row[column]:.1f}"

    body = [
        [
            f"loop {loop}",
            cell("valid", "honest", loop, "word_ppl"),
            cell("test", "honest", loop, "word_ppl"),
            cell("test", "honest", loop, "token_ppl"),
            cell("test", "honest", loop, "bits_per_byte"),
            cell("test", "released", loop, "token_ppl"),
        ]
        for loop in sorted({row["exit"] for row in rows})
    ]
    head = ["exit", "valid word PPL", "test word PPL", "test token PPL", "test bits/byte"]
    caption = (
        f"\n{part['parameters'] / 1e6:.2f}M parameters, {part['tokenizer']} tokens of "
        f"{part['corpus']}, {part['seconds'] / 60:.0f} minutes of training on "
        f"{part['environment']['device']} ({part['environment']['torch_threads']} threads), "
        f"seed {part['train']['seed']}. Last column: the same causal model scored as the paper "
        "scores, padding included."
    )
    return _table([*head, "test PPL, released protocol"], body) + "\n" + caption


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


def configuration_choice(results: Path) -> str:
    """`crt select`: the candidates of the small profile, best first."""
    rows = sorted(read_rows(results / "small" / "choice.csv"), key=lambda r: r["valid_loss"])
    body = [
        [
            f"`{row['candidate']}`",
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['seconds']:.0f}",
            f"{row['tokens']:,}",
            f"{row['valid_loss']:.3f}",
            str(row["best_exit"]),
        ]
        for row in rows
    ]
    head = ["candidate", "parameters", "seconds", "tokens seen", "valid loss (nats)", "at exit"]
    return _table(head, body)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "small": small_results,
    "bench": training_benchmark,
    "choice": configuration_choice,
}


def _pair(a: dict[str, Any], b: dict[str, Any], key: str, unit: float, form: str) -> str:
    return f"{form.format(a[key] / unit)} -> {form.format(b[key] / unit)}"


def _table(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
