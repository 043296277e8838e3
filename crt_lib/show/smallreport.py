"""The tables of the runs at `small`, each exit of `crt2`, what it is held against, its words."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from crt_lib.audit.accounting import multiply_adds
from crt_lib.config import config_from_dict
from crt_lib.files import InputError, read_rows
from crt_lib.runs.run import load_run
from crt_lib.study.sota import attempt_rows, published_rows

RUNS = {  # folder -> how its row is called
    "crt2": "`crt2`",
    "gpt2": "GPT-2 of its size",
    "gpt2_7_layers": "GPT-2 of its multiply-adds",
    "paper": "`paper`",
}
SEEDS = {"crt2": "seeds", "gpt2": "gpt2_seeds"}  # folder -> folder of its other seeds


def model_card(results: Path) -> str:
    """Every exit of the checkpoint that is handed out: `small/crt2` with its seed."""
    part, rows = _finished_run(results / "small" / "crt2")
    exits = {
        row["exit"]: row
        for row in read_rows(results / "small" / "crt2" / "exits.csv")
        if row["protocol"] == "honest"
    }
    scored = {(row["split"], row["exit"]): row for row in rows if row["protocol"] == "honest"}
    body = []
    for loop, own in exits.items():
        valid, test = scored["valid", loop], scored["test", loop]
        interval = f"{own['loss']:.3f} [{own['low']:.3f}, {own['high']:.3f}]"
        line = [f"{loop}", interval, f"{valid['word_ppl']:.1f}", f"{test['word_ppl']:.1f}"]
        body.append([*line, f"{test['bits_per_byte']:.3f}"])
    head = ["exit", "valid, nats a token", "valid word PPL", "test word PPL", "test bits/byte"]
    said = (
        f"{part['parameters']:,} parameters, {part['data_seen']['tokens']:,} tokens of training "
        f"(repetitions counted) in {part['seconds'] / 60:.0f} minutes on "
        f"{part['environment']['device']}, seed {part['train']['seed']}; 95 % intervals over "
        "documents."
    )
    return f"{markdown_table(head, body)}\n\n{said}"


def small_results(results: Path) -> str:
    """The small profile on WikiText-2: every exit of `crt2`, the last of the GPT-2s and of `paper`.

    Means over the runs of a recipe: `small/<recipe>`, and those of other seeds (SEEDS).
    """
    small = results / "small"
    runs = {name: _finished_run(small / name) for name in RUNS}
    tables = {name: [rows] for name, (_, rows) in runs.items()}
    seeds = {name: [str(part["train"]["seed"])] for name, (part, _) in runs.items()}
    for name, folder in SEEDS.items():
        others = sorted((small / folder).glob("*/results.csv"))
        tables[name] += [read_rows(path) for path in others]
        seeds[name] += [path.parent.name for path in others]

    def of_seeds(name: str, split: str, protocol: str, loop: int, column: str) -> list[float]:
        key = (split, protocol, loop)
        return [
            row[column]
            for rows in tables[name]
            for row in rows
            if (row["split"], row["protocol"], row["exit"]) == key
        ]

    def line(name: str, loop: int) -> list[str]:
        def cell(split: str, protocol: str, column: str, form: str = "{:.1f}") -> str:
            return form.format(statistics.fmean(of_seeds(name, split, protocol, loop, column)))

        part, _ = runs[name]
        counts = multiply_adds(config_from_dict(part["model"]), part["train"]["seq_len"], (loop,))
        return [
            RUNS[name] if name.startswith("gpt2") else f"{RUNS[name]}, loop {loop}",
            f"{part['parameters'] / 1e6:.2f}M",
            f"{sum(counts.values()) / 1e6:.1f}M",
            cell("valid", "honest", "word_ppl"),
            cell("test", "honest", "word_ppl"),
            cell("test", "honest", "token_ppl"),
            cell("test", "honest", "bits_per_byte", "{:.3f}"),
            cell("test", "released", "token_ppl"),
        ]

    loops = {name: sorted({row["exit"] for row in rows}) for name, (_, rows) in runs.items()}
    body = [line("crt2", loop) for loop in loops["crt2"]]
    body += [line(name, loops[name][-1]) for name in list(RUNS)[1:]]
    head = ["exit", "parameters", "multiply-adds", "valid word PPL", "test word PPL"]
    head += ["test token PPL", "test bits/byte", "test PPL, released protocol"]
    notes = [
        f"{RUNS[name]}: {part['data_seen']['tokens'] / 1e6:.1f}M tokens, {_seeds(seeds[name])}, "
        f"{part['seconds'] / 60:.0f} minutes on {_threads(part['environment']['torch_threads'])}"
        + (f" for seed {seeds[name][0]}" if len(seeds[name]) > 1 else "")
        for name, (part, _) in runs.items()
    ]
    bits = [of_seeds("crt2", "test", "honest", loop, "bits_per_byte") for loop in loops["crt2"]]
    gains = ", ".join(
        f"{statistics.fmean(a) - statistics.fmean(b):.3f}" for a, b in itertools.pairwise(bits)
    )
    spread = max(max(values) - min(values) for values in bits)
    ends = {
        name: of_seeds(name, "test", "honest", loops[name][-1], "bits_per_byte") for name in RUNS
    }
    gaps = []
    for name in ("gpt2", "gpt2_7_layers"):
        pairs = [a - b for a in ends["crt2"] for b in ends[name]]
        gap = statistics.fmean(ends["crt2"]) - statistics.fmean(ends[name])
        said = f"{gap:+.3f}, {min(pairs):+.3f} to {max(pairs):+.3f} over the pairs of seeds"
        gaps.append(f"the {RUNS[name]} {said}")
    part, _ = runs["crt2"]
    caption = (
        f"{part['tokenizer']} tokens of {part['corpus']}, on {part['environment']['device']}. "
        f"{'; '.join(notes)}. Multiply-adds: a token's, up to that exit and with its head alone. "
        f"Each further loop of `crt2` reduces bits per byte by: {gains}. At an exit its seeds "
        f"are at most {spread:.3f} bits apart. At full depth `crt2` minus {'; minus '.join(gaps)}. "
        "Last column: the same causal models scored as the paper scores, padding included."
    )
    return f"{markdown_table(head, body)}\n\n{caption}"


def words(results: Path) -> str:
    """The best on valid of the attempts with WikiText-2's own words, beside the published LSTM."""
    attempts = [r for r in attempt_rows(results / "small" / "words") if r["valid"] is not None]
    if not attempts:
        raise InputError(f"no finished run in {results / 'small' / 'words'}; `crt train`")
    best = min(attempts, key=lambda row: row["valid"])
    published = published_rows(results / "published.csv", "wikitext-2")
    lstm = next(row for row in published if row["model"] == "AWD-LSTM")
    passes = best["tokens_seen"] / best["text"]
    return (
        f"With the text's own {best['vocabulary']:,} words, the best on valid of "
        f"{len({row['model'] for row in attempts})} trainings and the ways to score them "
        f"({best['model']}, {best['way']}; {best['parameters'] / 1e6:.1f}M parameters, "
        f"{passes:.1f} times through the text) has a word perplexity of {best['test']:.1f} on "
        f"test. Published, {lstm['model']} with {lstm['parameters'] / 1e6:.0f}M: "
        f"{lstm['word_ppl']:g} ({lstm['source']})."
    )


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    """A table of these cells."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _threads(n: int) -> str:
    return "one thread" if n == 1 else f"{n} threads"


def _seeds(seeds: list[str]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {', '.join(seeds)}"


def _finished_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest's part, with what was seen of the data, and the rows of results.csv."""
    run = load_run(folder)
    if run is None:
        raise InputError(f"no finished run in {folder}; `crt train --profile small --recipe ...`")
    return run.manifest | {"data_seen": {"tokens": run.metrics[-1]["tokens"]}}, run.results
