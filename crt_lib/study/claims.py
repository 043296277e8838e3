"""The paper's claims, each held against the files under results/: `crt claims`.

claims.csv, beside this file, has what the paper says, the rule, and the command that measures. No
verdict is typed: a claim's judge reads measured files and applies its rule. Where nothing was
measured it says so and why.
"""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from crt_lib.files import write_rows, write_text
from crt_lib.study import costs, losses
from crt_lib.study.ledger import UNTESTED, Judged, Untested, summary

COLUMNS = (
    *("id", "claim", "paper", "place", "released", "honest", "verdict", "why", "rule"),
    *("profile", "seeds", "command"),
)
JUDGES: dict[str, Callable[[Path], Judged] | str] = {  # or why nothing here measures it
    "C01": costs.parameters,
    "C02": costs.fewer_than_gpt2,
    "C03": partial(losses.perplexity, split="valid", place=0, paper=1.093),
    "C04": partial(losses.perplexity, split="valid", place=1, paper=1.084),
    "C05": partial(losses.perplexity, split="valid", place=2, paper=1.081),
    "C06": partial(losses.perplexity, split="valid", place=-1, paper=1.105),
    "C07": losses.last_exit_is_worse,
    "C08": costs.speedups,
    "C09": partial(losses.perplexity, split="test", place=-1, paper=1.12),  # the easier of its two
    "C10": losses.gap,
    "C11": "no run of ten epochs on WikiText-103",
    "C12": partial(losses.ratio_to_linear, variant="conv", claimed=3.4080 / 1.8815),
    "C13": partial(losses.ratio_to_linear, variant="conv_linear", claimed=2.0),
    "C14": costs.embedding,
    "C15": partial(losses.best_as_it_is, base="", changes=(", batch norm", ", no norm")),
    "C16": partial(losses.best_as_it_is, base=", 4 cycles", changes=(", 4 cycles, dilations 1",)),
    "C17": "no run long enough to overfit late",
    "C18": costs.memory,
    "C19": "no such GPU here",
    "C20": costs.thresholds,
    "C21": partial(losses.published, model="GPT-2 Small", low=18, high=20),
    "C22": partial(losses.published, model="DistilGPT2", low=25, high=30),
    "C23": losses.against_gpt2,
    "C24": losses.older_baselines,
}
HEAD = """# The paper's claims, held against measurements

{summary}

Made by `crt claims` from the files beside it. `released`: as the paper scored, with a model that \
sees later tokens. `honest`: causal, every token of the text scored once. In brackets 95 % \
intervals, over documents and, of several seeds, over seeds; a value without them was measured \
once, or is a count. The two runs at `small` have four loops, so the paper's loops 2, 4, 6 and 8 \
are their exits 1 to 4; the released one also has separate heads and lines of 384 tokens, the \
causal one tied heads and windows of 256.

| id | claim | paper | released | honest | verdict | profile, seeds |
|---|---|---|---|---|---|---|
"""


def judge_claims(results: str | Path) -> list[dict[str, Any]]:
    """A row a claim, with the columns of `COLUMNS`, from the files under `results` alone."""
    with Path(__file__).with_name("claims.csv").open(newline="", encoding="utf-8") as file:
        claims = list(csv.DictReader(file))
    rows = []
    for claim in claims:
        judge = JUDGES[claim["id"]]
        try:
            judged = Judged(UNTESTED, judge) if isinstance(judge, str) else judge(Path(results))
        except Untested as reason:
            judged = Judged(UNTESTED, str(reason))
        row = claim | vars(judged)
        row["command"] = claim["command"].replace("{profile}", judged.profile)
        if judged.verdict == UNTESTED:
            row["command"] = ""
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def write_claims(results: str | Path) -> list[dict[str, Any]]:
    """Write claims.csv and claims.md into `results`; their rows."""
    results, rows = Path(results), judge_claims(results)
    write_rows(results / "claims.csv", rows)
    write_text(results / "claims.md", render_claims(rows))
    return rows


def render_claims(rows: list[dict[str, Any]]) -> str:
    """The ledger as a page."""
    lines = []
    for row in rows:
        cells = [row[name] for name in ("id", "claim", "paper", "released", "honest", "verdict")]
        cells.append(f"{row['profile']}, {row['seeds']}" if row["seeds"] else row["profile"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Rules, reasons, commands", ""]
    for row in rows:
        said = f"- **{row['id']}** ({row['place']}): {row['why']}."
        said += f" Rule: {row['rule']}." if row["rule"] else ""
        said += f" `{row['command']}`" if row["command"] else ""
        lines.append(said)
    return HEAD.format(summary=summary(rows)) + "\n".join(lines) + "\n"
