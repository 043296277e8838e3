"""The paper's claims, each held against the files under results/: `crt claims`.

No verdict is typed: a claim's `judge` reads measured files and applies its rule. Where nothing was
measured it says so and why.
"""

import csv
import io
from pathlib import Path
from typing import Any

from crt_lib.files import write_text
from crt_lib.study import costjudges, judges
from crt_lib.study.ledger import COLUMNS, NEAR, Claim, Results, render_claims

PPL_RULE = f"within {NEAR:.0%} of the paper's PPL, or below"
CLAIMS = (
    Claim(
        "C01",
        "total parameters",
        "~92M",
        "abstract, Table 1",
        "the released configuration within 1 % of 92M",
        costjudges.parameters,
    ),
    Claim(
        "C02",
        "fewer parameters than GPT-2 Small",
        "26 % fewer",
        "1",
        "the released configuration within a point of 26 %",
        costjudges.fewer_than_gpt2,
    ),
    Claim(
        "C03",
        "validation loss / PPL, exit at loop 2",
        "0.0892 / 1.093",
        "Table 2",
        PPL_RULE,
        judges.perplexity("valid", 0, 1.093),
    ),
    Claim(
        "C04",
        "validation loss / PPL, exit at loop 4",
        "0.0812 / 1.084",
        "Table 2",
        PPL_RULE,
        judges.perplexity("valid", 1, 1.084),
    ),
    Claim(
        "C05",
        "validation loss / PPL, exit at loop 6",
        "0.0778 / 1.081",
        "Table 2",
        PPL_RULE,
        judges.perplexity("valid", 2, 1.081),
    ),
    Claim(
        "C06",
        "validation loss / PPL, loop 8",
        "0.0996 / 1.105",
        "Table 2",
        PPL_RULE,
        judges.perplexity("valid", -1, 1.105),
    ),
    Claim(
        "C07",
        "loop 6 beats loop 8",
        "by 2.2 % PPL",
        "abstract, 5.2",
        "the exit before the last is better by 2.2 % or more, less a tenth",
        judges.last_exit_is_worse,
    ),
    Claim(
        "C08",
        "speedup at loops 2 / 4 / 6 / 8",
        "4.0 / 2.0 / 1.33 / 1.0",
        "Table 2",
        "each measured ratio reaches the claimed one, less a tenth",
        costjudges.speedups,
    ),
    Claim(
        "C09",
        "test PPL",
        "1.10 (abstract), 1.12 (5.5)",
        "both",
        PPL_RULE,
        judges.perplexity("test", -1, 1.12),  # of its two values the easier to reach
    ),
    Claim(
        "C10",
        "validation-test loss gap",
        "+24.2 %, below 0.15",
        "5.5",
        "the gap within 10 points of 24.2 %",
        judges.gap,
    ),
    Claim(
        "C11",
        "validation PPL by epoch",
        "1.116 at 4, 1.105 at 10",
        "5.1",
        "",
        judges.not_tested("no run of ten epochs on WikiText-103"),
    ),
    Claim(
        "C12",
        "TRM block ablation: convolution against linear, 3 loops",
        "3.4080 -> 1.8815 / 1.6986 / 2.1312",
        "Table 3",
        "the loss of linear over that of the pure convolution reaches 1.81x, less a tenth",
        judges.ratio_to_linear("conv", 3.4080 / 1.8815),
    ),
    Claim(
        "C13",
        "more than 2x the efficiency of linear recursion",
        "> 2x",
        "abstract, 1",
        "the loss of linear over that of convolution + linear reaches 2x, less a tenth",
        judges.ratio_to_linear("conv_linear", 2.0),
    ),
    Claim(
        "C14",
        "TRM embeddings save parameters",
        "32.9 % (41.0M vs 61.1M), 98.3 % of performance",
        "5.3",
        "the saving within a point of 32.9 %; else not derivable: one side is not described",
        costjudges.embedding,
    ),
    Claim(
        "C15",
        "LayerNorm is the best norm",
        "no table given",
        "4.2.2",
        "batch norm and none are worse by more than the noise between seeds",
        judges.best_as_it_is("", ("batch norm", "no norm")),
    ),
    Claim(
        "C16",
        "dilations (1, 2, 4, 8) give better local patterns",
        "no table given",
        "1",
        "dilations of 1 are worse by more than the noise between seeds",
        judges.best_as_it_is("4 cycles", ("4 cycles, dilations 1",)),
    ),
    Claim(
        "C17",
        "intermediate supervision regularises, prevents late overfitting",
        "no table given",
        "5.2",
        "",
        judges.not_tested("no run long enough to overfit late"),
    ),
    Claim(
        "C18",
        "trains on a 6 GB GPU",
        "RTX 4050",
        "abstract, 3.3.2",
        "peak memory of a training step at most 6 GB",
        costjudges.memory,
    ),
    Claim(
        "C19",
        "training time",
        "~15 h, 10 epochs, 50,000 samples",
        "3.3.2",
        "",
        judges.not_tested("no such GPU here"),
    ),
    Claim(
        "C20",
        "early exit with decaying threshold",
        'up to 1.33x "at optimal quality"',
        "3.3.3",
        "1.33x, less a tenth, at no more than +0.5 % PPL",
        costjudges.thresholds,
    ),
    Claim(
        "C21",
        "GPT-2 Small on WikiText-103",
        "PPL ~18-20, 124M",
        "Table 4",
        "every published value within a tenth of the range; of some only: not derivable",
        judges.published("GPT-2 Small", 18, 20),
    ),
    Claim(
        "C22",
        "DistilGPT2 on WikiText-103",
        "PPL ~25-30, 82M",
        "Table 4",
        "every published value within a tenth of the range; of some only: not derivable",
        judges.published("DistilGPT2", 25, 30),
    ),
    Claim(
        "C23",
        "CRT against GPT-2 Small",
        "~18x lower PPL",
        "readme, 5.4",
        "the ratio of perplexities reaches 18, less a tenth",
        judges.against_gpt2,
    ),
    Claim(
        "C24",
        "CRT against older baselines (PPL ~28.8)",
        "~43x",
        "5.5",
        "28.8 over the paper's PPL within a tenth of 43",
        judges.older_baselines,
    ),
)


def judge_claims(results: str | Path) -> list[dict[str, Any]]:
    """A row a claim, with the columns of `COLUMNS`, from the files under `results` alone."""
    found = Results(results)
    rows = []
    for claim in CLAIMS:
        judged = claim.judge(found)
        said = {"id": claim.id, "claim": claim.claim, "paper": claim.paper, "place": claim.place}
        row = said | {"rule": claim.rule} | vars(judged)
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def write_claims(results: str | Path) -> list[dict[str, Any]]:
    """Write claims.csv and claims.md into `results`; their rows."""
    results, rows = Path(results), judge_claims(results)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(results / "claims.csv", table.getvalue())
    write_text(results / "claims.md", render_claims(rows))
    return rows
