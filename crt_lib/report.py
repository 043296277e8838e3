"""The tables of the pages, made from the files under results/: no number is typed by hand."""

import itertools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crt_lib.claims import judge_claims
from crt_lib.compare import compare_arms
from crt_lib.exits import CRITERIA
from crt_lib.files import InputError, write_text
from crt_lib.ladder import EQUAL_TIME, EQUAL_TOKENS, LADDER, RUNG_TIME, RUNG_TOKENS, arms
from crt_lib.ledger import summary
from crt_lib.manifest import Manifest
from crt_lib.runs import load_run, read_rows, write_rows
from crt_lib.search import documents_file, steps, summarise

SEEDS = {"crt2": "seeds", "gpt2": "gpt2_seeds"}  # recipe -> folder of its other seeds
HEADLINES = ("C01", "C06", "C07", "C08", "C12", "C18", "C20", "C23")  # the title's and abstract's


def update_page(page: Path, results: Path) -> bool:
    """Rewrite the generated blocks of a page of PAGES from `results`; returns whether it changed.

    A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Raises InputError when one
    is missing.
    """
    old = page.read_text(encoding="utf-8")
    new = render(old, results, PAGES[page.name])
    if new != old:
        write_text(page, new)
    return new != old


def render(text: str, results: Path, blocks: Sequence[str]) -> str:
    """`text` with the generated blocks of these names made anew from the files under `results`."""
    for name in blocks:
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        block = BLOCKS[name](results) + "\n"
        text, found = re.subn(pattern, lambda m, b=block: m[1] + b + m[2], text, flags=re.DOTALL)
        if found != 1:
            raise InputError(f"the page has {found} blocks <!-- begin {name} -->; one is needed")
    return text


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
    return f"{_table(head, body)}\n\n{said}"


def small_results(results: Path) -> str:
    """The small profile on WikiText-2: every exit of `crt2`, the last of GPT-2 and of `paper`.

    Means over the runs of a recipe: `small/<recipe>`, and those of other seeds (SEEDS).
    """
    small = results / "small"
    runs = {name: _finished_run(small / name) for name in ("crt2", "gpt2", "paper")}
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

        return [
            "GPT-2 of its size" if name == "gpt2" else f"`{name}`, loop {loop}",
            f"{runs[name][0]['parameters'] / 1e6:.2f}M",
            cell("valid", "honest", "word_ppl"),
            cell("test", "honest", "word_ppl"),
            cell("test", "honest", "token_ppl"),
            cell("test", "honest", "bits_per_byte", "{:.3f}"),
            cell("test", "released", "token_ppl"),
        ]

    loops = {name: sorted({row["exit"] for row in rows}) for name, (_, rows) in runs.items()}
    body = [line("crt2", loop) for loop in loops["crt2"]]
    body += [line(name, loops[name][-1]) for name in ("gpt2", "paper")]
    head = ["exit", "parameters", "valid word PPL", "test word PPL", "test token PPL"]
    head += ["test bits/byte", "test PPL, released protocol"]
    notes = [
        f"`{name}`: {part['seconds'] / 60:.0f} minutes of training on "
        f"{_threads(part['environment']['torch_threads'])}, "
        f"{part['data_seen']['tokens'] / 1e6:.1f}M tokens, {_seeds(seeds[name])}"
        for name, (part, _) in runs.items()
    ]
    bits = [of_seeds("crt2", "test", "honest", loop, "bits_per_byte") for loop in loops["crt2"]]
    gains = ", ".join(
        f"{statistics.fmean(a) - statistics.fmean(b):.3f}" for a, b in itertools.pairwise(bits)
    )
    spread = max(max(values) - min(values) for values in bits)
    apart = f" At an exit its seeds are at most {spread:.3f} bits apart."
    ends = {
        name: of_seeds(name, "test", "honest", loops[name][-1], "bits_per_byte")
        for name in ("crt2", "gpt2")
    }
    gap = statistics.fmean(ends["crt2"]) - statistics.fmean(ends["gpt2"])
    gaps = [a - b for a in ends["crt2"] for b in ends["gpt2"]]
    apart += (
        f" At full depth `crt2` minus GPT-2: {gap:+.3f} bits per byte; {min(gaps):+.3f} to "
        f"{max(gaps):+.3f} over the pairs of seeds."
    )
    part, _ = runs["crt2"]
    caption = (
        f"\n{part['tokenizer']} tokens of {part['corpus']}, on {part['environment']['device']}. "
        f"{'; '.join(notes)}. Bits per byte that "
        f"each further loop of `crt2` takes off: {gains}.{apart} Last column: the "
        "same causal models scored as the paper scores, padding included."
    )
    return _table(head, body) + "\n" + caption


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


def recipe_comparison(results: Path) -> str:
    """`crt2` against the paper's block and GPT-2 of its size: bits per byte, with intervals."""
    path = results / "small" / "search.csv"
    rows, documents = read_rows(path), read_rows(documents_file(path))
    baselines = [*arms()["baselines"], "1 loop"]  # the last: are loops worth their time?
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
    caption = f"Seeds {seeds}; updates of {tokens:,} tokens; {'; '.join(budgets)}."
    return "\n\n".join(part for part in (table, caption, _largest_steps(rows)) if part)


def _largest_steps(rows: list[dict[str, Any]]) -> str:
    """The three changes that take most off the loss, of those between `paper` and `crt2`."""
    _, *ladder = arms()["ladder"]  # `released` is scored otherwise: what it sees is no step
    lines = []
    for title, budget in (("equal tokens", RUNG_TOKENS), ("equal time", RUNG_TIME)):
        summary = summarise(rows, ladder, budget)
        if len(summary) < len(ladder):
            continue
        taken = steps(summary)
        largest = sorted(taken, key=lambda name: -taken[name])[:3]
        said = ", ".join(f"{_change(name)} ({taken[name]:.2f})" for name in largest)
        lines.append(f"at {title} ({budget}): {said}")
    if not lines:
        return ""
    return (
        "From the paper's block to `crt2`, a change at a time, these three take most off the "
        f"validation loss (nats a token), {'; '.join(lines)}."
    )


def _change(name: str) -> str:
    return LADDER[-1].name if name == "crt2" else name


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


def costliest_operations(results: Path) -> str:
    """`crt bench step`: where a training step of `crt2` spends its time, and what was saved."""
    costs = read_rows(results / "bench" / "step_costs.csv")
    paths = read_rows(results / "bench" / "step.csv")
    named = ", ".join(f"`{row['operation']}` {row['share']:.0%}" for row in costs)
    faster = ", ".join(f"{row['path']} {row['speedup']:.2f}x" for row in paths[1:])
    first = paths[0]
    return (
        f"A training step of `crt2` at the size of `{first['profile']}` ({first['device']}, "
        f"{first['threads']} threads) spends most in {named}. Against a step that keeps whole "
        f"logits and trains every exit: {faster}."
    )


def decoding(results: Path) -> str:
    """`crt bench decode` on `crt2` at small: a row a way, speed for each batch size."""
    rows = read_rows(results / "small" / "crt2" / "decode.csv")
    batches = sorted({row["batch"] for row in rows})
    ways = {row["way"]: row for row in reversed(rows)}  # the first batch size's, of each
    plain = [way for way in ways if way in CRITERIA and ways[way]["tau"] is None]
    shown = [way for way in dict.fromkeys(row["way"] for row in rows) if way not in plain]
    body = []
    for way in shown:
        row = ways[way]
        cost = f"{row['multiply_adds'] / 1e6:.2f}M" if row["multiply_adds"] else ""
        line = [way, f"{row['mean_loops']:.2f}" if row["mean_loops"] else "", cost]
        line.append(f"{row['token_ppl']:.2f}" if row["token_ppl"] else "")
        for batch in batches:
            (own,) = [r for r in rows if (r["way"], r["batch"]) == (way, batch)] or [None]
            said = f"{own['tokens_per_second']:.0f} ({own['speedup']:.2f}x)" if own else ""
            line.append(said)
        body.append(line)
    head = ["decoding", "mean loops", "multiply-adds", "test PPL"]
    head += [f"tokens/s, {batch} at a time" for batch in batches]
    first, slow = ways["full depth"], ways["no cache"]
    where = f"{first['device']}, {first['threads']} threads, {first['precision']}"
    asking = [way for way in CRITERIA if way in plain]
    said = (
        f"{first['new_tokens']} new tokens, greedy, medians of {first['rounds']} rounds, "
        f"{slow['rounds']} without a cache ({where}); in brackets the speed against full depth in "
        "the same round. PPL of the first 50,000 tokens of test. Criteria are calibrated to lose "
        f"at most 0.5 % of the PPL; {', '.join(asking)} then take a fixed exit, because asking "
        "them costs more than it saves."
    )
    return f"{_table(head, body)}\n\n{said}"


def claims_summary(results: Path) -> str:
    """The ledger's counts, and the rows that the paper's title and abstract rest on."""
    rows = judge_claims(results)
    shown = [row for row in rows if row["id"] in HEADLINES]
    names = ("claim", "paper", "released", "honest", "verdict")
    table = _table(
        ["claim", "the paper", "as the paper scored", "honestly", "verdict"],
        [[str(row[name]) for name in names] for row in shown],
    )
    (loss,) = (row for row in rows if row["id"] == "C06")
    said = f"The row of losses is of {loss['why']}."
    return f"{table}\n\n{said}\n\n{summary(rows)} All: [results/claims.md](results/claims.md)."


def record_times(run: Path, results: Path) -> None:
    """Write results/notebooks.csv: what each notebook of a finished `crt reproduce` took.

    Raises InputError where a notebook is not done.
    """
    manifest = Manifest.load(run / "manifest.json", run.name)
    unfinished = [n for n, entry in manifest.notebooks.items() if entry["status"] != "done"]
    if unfinished or not manifest.notebooks:
        raise InputError(f"{run} has no finished run of the notebooks; `crt reproduce` first")
    rows = []
    for name, entry in manifest.notebooks.items():
        environment = entry["environment"]
        row = {"notebook": name, "profile": manifest.profile, "seconds": entry["seconds"]}
        row |= {"peak_memory_bytes": entry["peak_memory_bytes"], "device": environment["device"]}
        rows.append(row | {"cpu_count": environment["cpu_count"]})
    write_rows(results / "notebooks.csv", rows)


def notebook_table(results: Path) -> str:
    """Each notebook's question, as it says it, and what it took in `crt reproduce`."""
    took = {row["notebook"]: row for row in read_rows(results / "notebooks.csv")}
    body = []
    for path in sorted((results.parent / "notebooks").glob("[0-9]*.ipynb")):
        text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        question = re.search(r"\*\*Question\.\*\* (.*?)\n\n", text + "\n\n", re.DOTALL)
        seconds = f"{took[path.stem]['seconds']:.0f} s" if path.stem in took else ""
        said = " ".join(question[1].split()) if question else ""
        body.append([f"[{path.stem}](notebooks/{path.name})", said, seconds])
    first = next(iter(took.values()))
    where = f"{first['profile']}, {first['device']}, {first['cpu_count']} cores"
    return _table(["notebook", "question", where], body)


def ways_in(results: Path) -> str:
    """Three ways to begin, with the time and memory of the two that were measured."""
    took = read_rows(results / "notebooks.csv")
    minutes = sum(row["seconds"] for row in took) / 60
    memory = max(row["peak_memory_bytes"] for row in took) / 1e9
    bench = read_rows(results / "bench" / "train.csv")[1]
    step = f"{bench['rows']} x {bench['seq_len']} tokens"
    laptop = f"{minutes:.0f} minutes on {took[0]['cpu_count']} cores, and a few of installation"
    colab = "[01_data](https://colab.research.google.com/github/crt-lm/crt/blob/main/notebooks/01_data.ipynb)"
    gpu = "`crt train --profile paper --corpus wikitext-2 --vram-limit 6`"
    body = [
        ["Colab", f"open {colab}, run all; the next is linked at its end", "as below", "as below"],
        ["laptop", "`make reproduce`", laptop, f"{memory:.1f} GB"],
        [
            "GPU",
            gpu,
            "not measured yet",
            f"{bench['peak_memory_bytes'] / 1e9:.1f} GB: {step}, on a CPU",
        ],
    ]
    return _table(["way", "do", "time", "memory"], body)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "claims": claims_summary,
    "small": small_results,
    "recipe": recipe_comparison,
    "bench": training_benchmark,
    "step": costliest_operations,
    "decode": decoding,
    "card": model_card,
    "notebooks": notebook_table,
    "ways": ways_in,
}
PAGES = {  # page -> the names of its blocks
    "README.md": [name for name in BLOCKS if name != "card"],
    "MODEL_CARD.md": ["card"],
}


def _pair(a: dict[str, Any], b: dict[str, Any], key: str, unit: float, form: str) -> str:
    return f"{form.format(a[key] / unit)} -> {form.format(b[key] / unit)}"


def _table(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
