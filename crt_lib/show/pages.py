"""The tables of the pages, made from the files under results/: no number is typed by hand."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crt_lib.audit.compare import compare_arms
from crt_lib.exits.policy import CRITERIA
from crt_lib.files import InputError, read_rows, write_rows, write_text
from crt_lib.runs.manifest import Manifest
from crt_lib.show.address import Address
from crt_lib.show.smallreport import markdown_table, model_card, small_results, words
from crt_lib.study.claims import judge_claims
from crt_lib.study.ladder import EQUAL_TIME, EQUAL_TOKENS, LADDER, RUNG_TIME, RUNG_TOKENS, arms
from crt_lib.study.ledger import summary
from crt_lib.study.search import documents_file, steps, summarise

HEADLINES = ("C01", "C06", "C08", "C12", "C20")  # what the title and the abstract rest on


def update_page(page: Path, results: Path, blocks: Sequence[str]) -> bool:
    """Rewrite these generated blocks of a page from `results`; returns whether it changed.

    A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Raises InputError when one
    is missing.
    """
    old = page.read_text(encoding="utf-8")
    new = render(old, results, blocks)
    if new != old:
        write_text(page, new)
    return new != old


def render(text: str, results: Path, blocks: Sequence[str]) -> str:
    """`text` with the generated blocks of these names made anew from the files under `results`."""
    for name in blocks:
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        block = BLOCKS[name](results) + "\n"
        text, found = re.subn(pattern, _between(block), text, flags=re.DOTALL)
        if found != 1:
            raise InputError(f"the page has {found} blocks <!-- begin {name} -->; one is needed")
    return text


def _between(block: str) -> Callable[[re.Match[str]], str]:
    return lambda marks: marks[1] + block + marks[2]


def recipe_comparison(results: Path) -> str:
    """`crt2` against the paper's block and GPT-2 of its size: bits per byte, with intervals."""
    path = results / "small" / "search.csv"
    rows, documents = read_rows(path), read_rows(documents_file(path))
    baselines = [*arms()["baselines"], "1 loop"]  # the last: are loops worth their time?
    head, budgets = ["arm", "parameters"], []
    body: dict[str, list[str]] = {}
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
    table = markdown_table(head, [line + [""] * (len(head) - len(line)) for line in body.values()])
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
    return list(LADDER)[-1] if name == "crt2" else name


def _difference(row: dict[str, Any]) -> str:
    if "ours_minus" not in row:
        return ""
    interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if "low" in row else ", one seed"
    return f"{row['ours_minus']:+.3f}{interval}"


def training_benchmark(results: Path) -> str:
    """`crt bench train`: the released-style step against ours, then where ours spends its time."""
    rows = read_rows(results / "bench" / "train.csv")
    body = []
    for released, ours in zip(rows[::2], rows[1::2], strict=True):
        speed = ours["useful_tokens_per_second"] / released["useful_tokens_per_second"]
        memory = ours["peak_memory_bytes"] / released["peak_memory_bytes"]
        body.append(
            [
                *_case(ours),
                _pair(released, ours, "useful_tokens_per_second", 1, "{:.1f}"),
                f"{speed:.2f}x",
                _pair(released, ours, "peak_memory_bytes", 1e9, "{:.2f}"),
                f"{memory:.2f}x",
                _pair(released, ours, "mfu", 0.01, "{:.0f} %"),
            ]
        )
    head = [*_CASE, "useful tokens/s", "ratio", "peak GB", "ratio", "MFU"]
    said = f"Released-style in fp32 -> ours, {rows[0]['device']}. MFU: of the precision's own peak."
    return f"{markdown_table(head, body)}\n\n{said}\n\n{_parts(results)}"


_CASE = ["step", "ours in", "ISA", "threads"]


def _case(row: dict[str, Any]) -> list[str]:
    return [f"{row['rows']} x {row['seq_len']}", row["case"], row["isa"], str(row["threads"])]


def _parts(results: Path) -> str:
    """A row a case of train_parts.csv, a column a part: its share of the step, and of its bound."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in read_rows(results / "bench" / "train_parts.csv"):
        cases.setdefault(tuple(_case(row)), {})[row["part"]] = row
    body = []
    for case, parts in cases.items():
        cells = []
        for row in parts.values():
            reached = f" ({row['of_bound']:.0%})" if row["of_bound"] is not None else ""
            cells.append(f"{row['share']:.0%}{reached}")
        most = max(parts.values(), key=lambda row: row["share_of_lost"])
        body.append([*case, *cells, f"{most['part']}, {most['share_of_lost']:.0%}"])
    names = list(next(iter(cases.values())))
    said = (
        "Our step by part: the share of its time, and in brackets how much of the part's bound is "
        "reached: its multiply-adds, recomputation apart, at the peak; for the optimiser and the "
        "depthwise taps their bytes at the memory's bandwidth. Last, the part that loses most, and "
        "its share of all that is lost."
    )
    return f"{said}\n\n{markdown_table([*_CASE, *names, 'most lost in'], body)}"


def cost_against_size(results: Path) -> str:
    """`crt bench cost`: tokens/s and peak memory, a row a size, a column a number of threads."""
    tables = [
        _cost_table(read_rows(folder / "cost.csv"))
        for folder in (results / "bench", _avx2(results))
    ]
    said = "An update of `crt2` at the size of `small`, and one change at a time."
    return "\n\n".join([said, *tables])


def _cost_table(rows: list[dict[str, Any]]) -> str:
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    axes = ("batch", "length", "loops", "d")
    sizes: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        line = sizes.setdefault(tuple(row[axis] for axis in axes), [])
        line += [f"{row['tokens_per_second']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.2f}"]
    head = list(axes)
    for count in threads:
        many = "1 thread" if count == 1 else f"{count} threads"
        head += [f"tokens/s, {many}", f"peak GB, {many}"]
    body = [[*map(str, size), *cells] for size, cells in sizes.items()]
    precisions = ", ".join(sorted({row["precision"] for row in rows}))
    where = f"{rows[0]['device']}, {rows[0]['isa']}, in {precisions}:"
    return f"{where}\n\n{markdown_table(head, body)}"


def _avx2(results: Path) -> Path:
    return results / "bench" / "avx2"


def costliest_operations(results: Path) -> str:
    """`crt bench step`: where a training step of `crt2` spends its time, and what was saved."""
    costs = read_rows(results / "bench" / "step_costs.csv")
    paths = read_rows(results / "bench" / "step.csv")
    named = ", ".join(f"`{row['operation']}` {row['share']:.0%}" for row in costs)
    faster = ", ".join(f"{row['path']} {row['speedup']:.2f}x" for row in paths[1:])
    first = paths[0]
    where = f"{first['device']}, {first['isa']}, {first['threads']} threads, {first['precision']}"
    shares = "; ".join(
        f"{updates[0]['isa']}, "
        + ", ".join(
            f"{row['profile']} {row['recipe']} ({row['optimizer']}, {row['precision']}) "
            f"{row['optimizer_share']:.1%}"
            for row in updates
        )
        for folder in (results / "bench", _avx2(results))
        for updates in [read_rows(folder / "step_updates.csv")]
    )
    return (
        f"A training step of `crt2` at the size of `{first['profile']}` ({where}) spends most in "
        f"{named}. Against a step that keeps whole logits and trains every exit: {faster}. "
        f"The optimiser's share of an update: {shares}."
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
            own = next((r for r in rows if (r["way"], r["batch"]) == (way, batch)), None)
            said = f"{own['tokens_per_second']:.0f}" if own else ""
            line.append(f"{said} ({own['speedup']:.2f}x)" if own and own.get("speedup") else said)
        body.append(line)
    head = ["decoding", "mean loops", "multiply-adds", "test PPL"]
    head += [f"tokens/s, {batch} at a time" for batch in batches]
    first, slow = ways["full depth"], ways["no cache"]
    where = f"{first['device']}, {first['isa']}, {first['threads']} threads, {first['precision']}"
    asking = [way for way in CRITERIA if way in plain]
    said = (
        f"{first['new_tokens']} new tokens, greedy, medians of {first['rounds']} rounds, "
        f"{slow['rounds']} without a cache ({where}), the first token apart; in brackets the speed "
        "against full depth in the same round. PPL of the first 50,000 tokens of test. Criteria "
        f"are calibrated to lose at most 0.5 % of the PPL; {', '.join(asking)} then take a fixed "
        "exit, because asking them costs more than it saves."
    )
    return f"{markdown_table(head, body)}\n\n{said}\n\n{_bounds(results, rows)}"


def _bounds(results: Path, rows: list[dict[str, Any]]) -> str:
    """How near full depth comes to reading its weights, and what 8 bits lose."""
    said = []
    for found in (rows, read_rows(_avx2(results) / "decode.csv")):
        for batch in sorted({row["batch"] for row in found}):
            (full,) = [r for r in found if (r["way"], r["batch"]) == ("full depth", batch)]
            said.append(
                f"{full['isa']}, {batch} at a time {full['ms']:.2f} ms "
                f"({full['ms_p5']:.2f} to {full['ms_p95']:.2f}), {full['bound_share']:.0%} and "
                f"{full['bound_share_all']:.0%}; one thread {full['bound_share_1']:.0%} and "
                f"{full['bound_share_all_1']:.0%}"
            )
    lost = read_rows(results / "bench" / "quantize.csv")
    deep = [row for row in lost if row["exit"] == max(r["exit"] for r in lost)]
    loses = ", ".join(
        f"{row['word_ppl_ratio'] - 1:.2%} with {row['rows']} at a time "
        f"({row['quantized_weight_mb']:.0f} of {row['weight_mb']:.0f} MB)"
        for row in deep
    )
    return (
        "A step at full depth, and the share of it that the products with its weights take alone, "
        f"without and with keys and values: {'; '.join(said)}. 8-bit weights add to the word "
        f"perplexity of test {loses}."
    )


def claims_summary(results: Path) -> str:
    """The ledger's counts, and the rows that the paper's title and abstract rest on."""
    rows = judge_claims(results)
    shown = [row for row in rows if row["id"] in HEADLINES]
    names = ("claim", "paper", "released", "honest")
    table = markdown_table(
        ["claim", "claimed", "as scored", "honestly"],
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
    return markdown_table(["notebook", "question", where], body)


def ways_in(results: Path) -> str:
    """Three ways to begin, with the time and memory of the two that were measured."""
    took = read_rows(results / "notebooks.csv")
    minutes = sum(row["seconds"] for row in took) / 60
    memory = max(row["peak_memory_bytes"] for row in took) / 1e9
    bench = read_rows(results / "bench" / "train.csv")[1]
    step = f"{bench['rows']} x {bench['seq_len']} tokens"
    laptop = f"{minutes:.0f} minutes on {took[0]['cpu_count']} cores, and a few of installation"
    colab = f"[01_data]({Address.read(results.parent).colab('01_data')})"
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
    return markdown_table(["way", "do", "time", "memory"], body)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "claims": claims_summary,
    "small": small_results,
    "recipe": recipe_comparison,
    "words": words,
    "bench": training_benchmark,
    "step": costliest_operations,
    "cost": cost_against_size,
    "decode": decoding,
    "card": model_card,
    "notebooks": notebook_table,
    "ways": ways_in,
}
PAGES = {  # page -> the names of its blocks
    "README.md": ("claims", "notebooks", "ways"),
    "results/README.md": ("small", "recipe", "words", "bench", "step", "cost", "decode"),
    "MODEL_CARD.md": ("card",),
}


def _pair(a: dict[str, Any], b: dict[str, Any], key: str, unit: float, form: str) -> str:
    return f"{form.format(a[key] / unit)} -> {form.format(b[key] / unit)}"
