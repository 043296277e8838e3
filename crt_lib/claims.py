"""The paper's claims, each held against the files under results/: `crt claims`.

No verdict is typed: a claim's `judge` reads measured files and applies its rule. Where nothing was
measured it says so and why.
"""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.accounting import parameters_by_part
from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.files import write_text
from crt_lib.manifest import read_training
from crt_lib.runs import read_rows

HOLDS, LEAK, FAILS = "holds", "holds only under the leak", "does not hold"
UNDERIVED, UNTESTED = "not derivable", "not tested"
LARGEST_FIRST = ("paper", "small")  # the smaller ones are made anew wherever the notebooks run
NO_PAIR = "no profile has a finished run of both recipes, released and paper"
NEAR = 0.1  # of the paper's value: what counts as the same

COLUMNS = ("id", "claim", "paper", "place", "released", "honest", "verdict", "why", "rule")
COLUMNS += ("profile", "seeds", "command")


@dataclass(frozen=True)
class Judged:
    """What was found: both protocols' values as text, the verdict, and where it comes from."""

    verdict: str
    why: str = ""
    released: str = ""
    honest: str = ""
    profile: str = ""
    seeds: int = 0
    command: str = ""


@dataclass(frozen=True)
class Claim:
    """A row of the ledger: what the paper says and where, and how it is judged."""

    id: str
    claim: str
    paper: str
    place: str
    rule: str
    judge: Callable[["Results"], Judged]


class Results:
    """The measured files; each answer comes from the largest profile that has it."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def run(self, profile: str, recipe: str) -> "RunRows | None":
        """The results of a finished run of `recipe` at `profile`."""
        path = self.root / profile / recipe / "results.csv"
        part = read_training(path.parent)
        if part is None or part["status"] != "done" or not path.is_file():
            return None
        return RunRows(profile, recipe, read_rows(path))

    def pair(self) -> "tuple[RunRows, RunRows] | None":
        """The released block and the same made causal, at the largest profile that has both."""
        for profile in LARGEST_FIRST:
            released, paper = (self.run(profile, recipe) for recipe in ("released", "paper"))
            if released and paper:
                return released, paper
        return None

    def table(self, name: str) -> tuple[str, list[dict[str, Any]]] | None:
        """The profile and rows of `results/<profile>/<name>`."""
        for profile in LARGEST_FIRST:
            path = self.root / profile / name
            if path.is_file():
                return profile, read_rows(path)
        return None

    def bench(self, name: str) -> list[dict[str, Any]] | None:
        """The rows of `results/bench/<name>`."""
        path = self.root / "bench" / name
        return read_rows(path) if path.is_file() else None


@dataclass(frozen=True)
class RunRows:
    """results.csv of a run."""

    profile: str
    recipe: str
    rows: list[dict[str, Any]]

    @property
    def command(self) -> str:
        """What made it."""
        return f"crt train --profile {self.profile} --recipe {self.recipe}"

    def loss(self, split: str, protocol: str, place: int) -> float | None:
        """Of the `place`-th exit (-1: the last), nats a position; None if it was not scored so."""
        found = [r for r in self.rows if (r["split"], r["protocol"]) == (split, protocol)]
        found.sort(key=lambda row: row["exit"])
        return found[place]["loss"] if len(found) > max(place, 0) else None


def _three_way(paper: float, released: float, honest: float) -> str:
    """The verdict of a number that is claimed: within `NEAR` of the paper's, or better."""
    if honest <= paper * (1 + NEAR):
        return HOLDS
    return LEAK if released <= paper * (1 + NEAR) else FAILS


def _perplexity(split: str, place: int, paper: float) -> Callable[[Results], Judged]:
    def judge(results: Results) -> Judged:
        pair = results.pair()
        if pair is None:
            return Judged(UNTESTED, NO_PAIR)
        released, honest = pair
        ours = released.loss(split, "released", place), honest.loss(split, "honest", place)
        if None in ours:
            return Judged(UNTESTED, "these runs have no such exit or protocol")
        ppl = [math.exp(loss) for loss in ours]
        return Judged(
            _three_way(paper, *ppl),
            f"exit {place + 1 if place >= 0 else 'last'} of the released block, padding scored, "
            "against the causal block's, every token scored once",
            released=f"PPL {ppl[0]:.3f}",
            honest=f"PPL {ppl[1]:.1f}",
            profile=released.profile,
            seeds=1,
            command=f"{released.command}; {honest.command}",
        )

    return judge


def _last_exit_is_worse(results: Results) -> Judged:
    pair = results.pair()
    if pair is None:
        return Judged(UNTESTED, NO_PAIR)
    released, honest = pair
    gains = []
    for run, protocol in ((released, "released"), (honest, "honest")):
        before, last = run.loss("valid", protocol, -2), run.loss("valid", protocol, -1)
        gains.append(math.expm1(last - before))
    claimed = 0.022 * (1 - NEAR)
    verdict = FAILS if gains[0] < claimed else LEAK
    verdict = HOLDS if gains[1] >= claimed else verdict
    corrected = results.run(released.profile, "crt2")
    why = "how much lower the PPL of the exit before the last is, the paper's block"
    if corrected:
        own = math.expm1(
            corrected.loss("valid", "honest", -1) - corrected.loss("valid", "honest", -2)
        )
        why += f"; crt2: {own:+.1%}"
    return Judged(
        verdict,
        why,
        f"{gains[0]:+.1%}",
        f"{gains[1]:+.1%}",
        released.profile,
        1,
        f"{released.command}; {honest.command}",
    )


def _speedups(results: Results) -> Judged:
    rows = results.bench("decode_paper.csv")
    if rows is None:
        return Judged(UNTESTED, "crt bench decode has not been run on the paper's block")
    speeds = {row["way"]: row["speedup"] for row in rows if row["batch"] == 1}
    claimed = {"exit 2": 4.0, "exit 4": 2.0, "exit 6": 8 / 6}
    held = all(speeds[way] >= ratio * (1 - NEAR) for way, ratio in claimed.items())
    said = ", ".join(f"{way} {speeds[way]:.2f}x" for way in claimed)
    return Judged(
        HOLDS if held else FAILS,
        "8/2, 8/4 and 8/6 count loops; embedding and head are left out",
        honest=said,
        profile="quick",
        seeds=1,
        command="crt bench decode results/quick/paper",
    )


def _thresholds(results: Results) -> Judged:
    rows = results.bench("decode_paper.csv")
    if rows is None:
        return Judged(UNTESTED, "crt bench decode has not been run on the paper's block")
    (row,) = (row for row in rows if (row["batch"], row["way"]) == (1, "the paper's thresholds"))
    (full,) = (row for row in rows if (row["batch"], row["way"]) == (1, "full depth"))
    worse = row["token_ppl"] / full["token_ppl"] - 1
    held = row["speedup"] >= 1.33 * (1 - NEAR) and worse <= 0.005
    return Judged(
        HOLDS if held else FAILS,
        "confidence is read from a vocabulary head at every exit, which costs more than the loops "
        "that it saves",
        honest=f"{row['speedup']:.2f}x at {worse:+.1%} PPL",
        profile="quick",
        seeds=1,
        command="crt bench decode results/quick/paper",
    )


def _parameters(results: Results) -> Judged:
    released, shared = (_total(sharing) for sharing in ("separate", "shared_aux"))
    return Judged(
        HOLDS if abs(released / 92e6 - 1) <= 0.01 else FAILS,
        "the released heads are separate; with one projection for the three early heads it is 92M",
        released=f"{released:,}",
        honest=f"{shared:,} with shared early heads",
        command="crt_lib.audit.parameter_report(ModelConfig(head_sharing='separate'))",
    )


def _fewer_than_gpt2(results: Results) -> Judged:
    gpt2 = sum(
        parameters_by_part(
            GPT2Config(vocab_size=50257, d_model=768, n_heads=12, n_layers=12, max_seq_len=1024)
        ).values()
    )
    released, shared = (1 - _total(s) / gpt2 for s in ("separate", "shared_aux"))
    return Judged(
        HOLDS if abs(released - 0.26) <= 0.01 else FAILS,
        "as C01",
        released=f"{-released:+.0%}",
        honest=f"{-shared:+.0%} with shared early heads",
        command="crt_lib.audit.parameter_report",
    )


def _total(sharing: str, **changes: Any) -> int:
    return sum(parameters_by_part(ModelConfig(head_sharing=sharing, **changes)).values())


def _gap(results: Results) -> Judged:
    pair = results.pair()
    if pair is None:
        return Judged(UNTESTED, NO_PAIR)
    released, honest = pair
    gaps = [
        run.loss("test", protocol, -1) / run.loss("valid", protocol, -1) - 1
        for run, protocol in ((released, "released"), (honest, "honest"))
    ]
    near = [abs(gap - 0.242) <= NEAR for gap in gaps]
    return Judged(
        HOLDS if near[1] else LEAK if near[0] else FAILS,
        "how much larger the last exit's loss is on test than on valid",
        *(f"{gap:+.1%}" for gap in gaps),
        released.profile,
        1,
        f"{released.command}; {honest.command}",
    )


def _ratio_to_linear(variant: str, claimed: float) -> Callable[[Results], Judged]:
    def judge(results: Results) -> Judged:
        found = results.table("audit/table_3.csv")
        if found is None:
            return Judged(UNTESTED, "notebook 08 has not been run")
        profile, rows = found
        of = {row["variant"]: row for row in rows}
        ratios = [of["linear"][kind] / of[variant][kind] for kind in ("symmetric", "causal")]
        least = claimed * (1 - NEAR)
        verdict = HOLDS if ratios[1] >= least else LEAK if ratios[0] >= least else FAILS
        return Judged(
            verdict,
            f"the loss of linear over that of {variant}, 3 loops; with the leak, and without",
            *(f"{ratio:.2f}x" for ratio in ratios),
            profile,
            1,
            f"crt reproduce --profile {profile} --only 08_claims_audit",
        )

    return judge


def _embedding(results: Results) -> Judged:
    half = _total("tied")
    full = _total("tied", embed_dim=512)
    return Judged(
        HOLDS if abs(1 - half / full - 0.329) <= 0.01 else FAILS,
        f"tied heads, embeddings d/2 and d wide: {half / 1e6:.1f}M and {full / 1e6:.1f}M "
        "parameters. The 98.3 % is not tested: of what, the paper does not say",
        honest=f"{1 - half / full:.1%} fewer",
        command="crt_lib.accounting.parameters_by_part",
    )


def _memory(results: Results) -> Judged:
    rows = results.bench("train.csv")
    if rows is None:
        return Judged(UNTESTED, "crt bench train has not been run")
    peaks = [row["peak_memory_bytes"] / 1e9 for row in rows if row["rows"] == 2]
    return Judged(
        HOLDS if max(peaks) <= 6 else FAILS,
        "peak memory of the process that trains Table 1's model, 2 x 384 tokens, checkpointed, on "
        "a CPU; as released and with our step",
        released=f"{peaks[0]:.2f} GB",
        honest=f"{peaks[1]:.2f} GB",
        profile="paper",
        command="crt bench train",
    )


def _against_gpt2(results: Results) -> Judged:
    found = results.table("search.csv")
    if found is None:
        return Judged(UNTESTED, "crt search has not been run")
    profile, rows = found
    best = {
        arm: min(r["valid_loss"] for r in rows if (r["arm"], r["budget"]) == (arm, "300 updates"))
        for arm in ("paper, d = 160", "GPT-2 112 x 4", "crt2")
    }
    ratio, own = (math.exp(best["GPT-2 112 x 4"] - best[arm]) for arm in ("paper, d = 160", "crt2"))
    return Judged(
        HOLDS if ratio >= 18 * (1 - NEAR) else FAILS,
        "PPL of a GPT-2 of equal parameters and tokens over ours, both tuned: the paper's block "
        f"made causal; crt2 {own:.2f}x. The released 18x divides a leaking PPL into a sound one",
        honest=f"{ratio:.2f}x",
        profile=profile,
        seeds=1,
        command='crt search "paper, d = 160" "GPT-2 112 x 4" crt2 --updates 300',
    )


def _published(model: str, low: float, high: float) -> Callable[[Results], Judged]:
    def judge(results: Results) -> Judged:
        path = results.root / "published.csv"
        rows = read_rows(path) if path.is_file() else []
        known = [row for row in rows if (row["model"], row["corpus"]) == (model, "wikitext-103")]
        if not known:
            return Judged(
                UNTESTED, "no published number is known to us, and its weights need a hub"
            )
        held = any(low * (1 - NEAR) <= row["ppl"] <= high * (1 + NEAR) for row in known)
        said = "; ".join(f"{row['ppl']:g} a {row['unit']} ({row['source']})" for row in known)
        return Judged(
            HOLDS if held else FAILS,
            "the paper's range against what was published, without training on WikiText-103",
            honest=said,
            command="results/published.csv",
        )

    return judge


def _not_tested(why: str) -> Callable[[Results], Judged]:
    return lambda results: Judged(UNTESTED, why)


def _older_baselines(results: Results) -> Judged:
    return Judged(
        UNDERIVED if abs(28.8 / 1.08 / 43 - 1) > NEAR else HOLDS,
        f"28.8 / 1.08 is {28.8 / 1.08:.0f}",
        command="arithmetic",
    )


def _test_perplexity(results: Results) -> Judged:
    """The paper gives two values; the larger is the easier to reach."""
    return _perplexity("test", -1, 1.12)(results)


PPL_RULE = f"within {NEAR:.0%} of the paper's PPL, or below"
CLAIMS = (
    Claim(
        "C01",
        "total parameters",
        "~92M",
        "abstract, Table 1",
        "the released configuration within 1 % of 92M",
        _parameters,
    ),
    Claim(
        "C02",
        "fewer parameters than GPT-2 Small",
        "26 % fewer",
        "1",
        "the released configuration within a point of 26 %",
        _fewer_than_gpt2,
    ),
    Claim(
        "C03",
        "validation loss / PPL, exit at loop 2",
        "0.0892 / 1.093",
        "Table 2",
        PPL_RULE,
        _perplexity("valid", 0, 1.093),
    ),
    Claim(
        "C04",
        "validation loss / PPL, exit at loop 4",
        "0.0812 / 1.084",
        "Table 2",
        PPL_RULE,
        _perplexity("valid", 1, 1.084),
    ),
    Claim(
        "C05",
        "validation loss / PPL, exit at loop 6",
        "0.0778 / 1.081",
        "Table 2",
        PPL_RULE,
        _perplexity("valid", 2, 1.081),
    ),
    Claim(
        "C06",
        "validation loss / PPL, loop 8",
        "0.0996 / 1.105",
        "Table 2",
        PPL_RULE,
        _perplexity("valid", -1, 1.105),
    ),
    Claim(
        "C07",
        "loop 6 beats loop 8",
        "by 2.2 % PPL",
        "abstract, 5.2",
        "the exit before the last is better by 2.2 % or more, less a tenth",
        _last_exit_is_worse,
    ),
    Claim(
        "C08",
        "speedup at loops 2 / 4 / 6 / 8",
        "4.0 / 2.0 / 1.33 / 1.0",
        "Table 2",
        "each measured ratio reaches the claimed one, less a tenth",
        _speedups,
    ),
    Claim("C09", "test PPL", "1.10 (abstract), 1.12 (5.5)", "both", PPL_RULE, _test_perplexity),
    Claim(
        "C10",
        "validation-test loss gap",
        "+24.2 %, below 0.15",
        "5.5",
        "the gap within 10 points of 24.2 %",
        _gap,
    ),
    Claim(
        "C11",
        "validation PPL by epoch",
        "1.116 at 4, 1.105 at 10",
        "5.1",
        "",
        _not_tested("no run of ten epochs on WikiText-103"),
    ),
    Claim(
        "C12",
        "TRM block ablation: convolution against linear, 3 loops",
        "3.4080 -> 1.8815 / 1.6986 / 2.1312",
        "Table 3",
        "the loss of linear over that of the pure convolution reaches 1.81x, less a tenth",
        _ratio_to_linear("conv", 3.4080 / 1.8815),
    ),
    Claim(
        "C13",
        "more than 2x the efficiency of linear recursion",
        "> 2x",
        "abstract, 1",
        "the loss of linear over that of convolution + linear reaches 2x, less a tenth",
        _ratio_to_linear("conv_linear", 2.0),
    ),
    Claim(
        "C14",
        "TRM embeddings save parameters",
        "32.9 % (41.0M vs 61.1M), 98.3 % of performance",
        "5.3",
        "the saving within a point of 32.9 %",
        _embedding,
    ),
    Claim(
        "C15",
        "LayerNorm is the best norm",
        "no table given",
        "4.2.2",
        "",
        _not_tested("the norms have not been compared yet"),
    ),
    Claim(
        "C16",
        "dilations (1, 2, 4, 8) give better local patterns",
        "no table given",
        "1",
        "",
        _not_tested("other dilations have not been compared yet"),
    ),
    Claim(
        "C17",
        "intermediate supervision regularises, prevents late overfitting",
        "no table given",
        "5.2",
        "",
        _not_tested("no run long enough to overfit late"),
    ),
    Claim(
        "C18",
        "trains on a 6 GB GPU",
        "RTX 4050",
        "abstract, 3.3.2",
        "peak memory of a training step at most 6 GB",
        _memory,
    ),
    Claim(
        "C19",
        "training time",
        "~15 h, 10 epochs, 50,000 samples",
        "3.3.2",
        "",
        _not_tested("no such GPU here"),
    ),
    Claim(
        "C20",
        "early exit with decaying threshold",
        'up to 1.33x "at optimal quality"',
        "3.3.3",
        "1.33x, less a tenth, at no more than +0.5 % PPL",
        _thresholds,
    ),
    Claim(
        "C21",
        "GPT-2 Small on WikiText-103",
        "PPL ~18-20, 124M",
        "Table 4",
        "a published value within a tenth of the range",
        _published("GPT-2 Small", 18, 20),
    ),
    Claim(
        "C22",
        "DistilGPT2 on WikiText-103",
        "PPL ~25-30, 82M",
        "Table 4",
        "a published value within a tenth of the range",
        _published("DistilGPT2", 25, 30),
    ),
    Claim(
        "C23",
        "CRT against GPT-2 Small",
        "~18x lower PPL",
        "readme, 5.4",
        "the ratio of perplexities reaches 18, less a tenth",
        _against_gpt2,
    ),
    Claim(
        "C24",
        "CRT against older baselines (PPL ~28.8)",
        "~43x",
        "5.5",
        "28.8 over the paper's PPL within a tenth of 43",
        _older_baselines,
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


def render_claims(rows: list[dict[str, Any]]) -> str:
    """The ledger as a page."""
    lines = ["# The paper's claims, held against measurements", "", summary(rows), ""]
    lines += [
        "Made by `crt claims` from the files beside it. `released`: as the paper scored, with a "
        "model that sees later tokens. `honest`: causal, every token of the text scored once. One "
        "seed and no interval unless a row says otherwise.",
        "",
        "| id | claim | paper | released | honest | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row[name] for name in ("id", "claim", "paper", "released", "honest", "verdict"))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", "## Rules, reasons, commands", ""]
    for row in rows:
        where = f"{row['profile']}, {row['seeds']} seed(s)" if row["profile"] else ""
        parts = [f"**{row['id']}** ({row['place']}): {row['why']}."]
        parts += [f"Rule: {row['rule']}."] if row["rule"] else []
        parts += [f"Measured at {where}."] if where else []
        parts += [f"`{row['command']}`"] if row["command"] else []
        lines.append("- " + " ".join(parts))
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many claims have each verdict."""
    order = (HOLDS, LEAK, FAILS, UNDERIVED, UNTESTED)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in order}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"Of the paper's {len(rows)} claims: {said}."
