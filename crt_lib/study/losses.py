"""How the paper's claims of losses and perplexities are judged: a small function a rule."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crt_lib.audit.compare import compare_arms
from crt_lib.files import InputError
from crt_lib.runs.run import Run, load_run
from crt_lib.study.ablations import (
    NO_VERDICT,
    ONE_SEED,
    finding,
    in_words,
    searched_table_3,
    worth,
)
from crt_lib.study.ladder import EQUAL_TOKENS
from crt_lib.study.ledger import (
    FAILS,
    HOLDS,
    NEAR,
    UNDERIVED,
    Judged,
    Untested,
    judged_pair,
    loss_of,
    reaches,
    row_with_interval,
    scored_pair,
    table,
    verdict,
)

UNSEARCHED = "the ablations have not been searched"
GPT2S = ("GPT-2 112 x 4", "GPT-2 112 x 4, muon")  # of equal parameters


def perplexity(results: Path, split: str, place: int, paper: float) -> Judged:
    """The PPL of an exit: near the paper's, or better?"""
    pair, held, said = scored_pair(results), [], []
    for (protocol, run), form in zip(pair.items(), (".3f", ".1f"), strict=True):
        ppl = math.exp(loss_of(run, split, protocol, place))
        row = row_with_interval(run, protocol, place) if split == "valid" else None
        low, high = (math.exp(row[end]) if row else ppl for end in ("low", "high"))
        held.append(ppl <= paper * (1 + NEAR))
        said.append(f"PPL {ppl:{form}}" + (f" [{low:{form}}, {high:{form}}]" if row else ""))
    leaking = math.exp(loss_of(pair["released"], split, "honest", place))
    alone = math.exp(loss_of(pair["released"], "valid", "deployable", place))
    why = (
        f"{'the last exit' if place < 0 else f'exit {place + 1}'} of the released block, padding "
        "scored, against the causal block's, every token scored once. On windows without padding "
        f"the released block has PPL {leaking:.3f}, by the leak alone. With nothing after the "
        f"token in its input it has {alone:,.0f} (a sample of valid)"
    )
    return judged_pair(pair, held, why, said)


def last_exit_is_worse(results: Path) -> Judged:
    """That the exit before the last has the lower PPL, by 2.2 %."""
    pair = scored_pair(results)
    gains = [_gain(run, protocol) for protocol, run in pair.items()]
    why = "the exit before the last against the last, in PPL, the paper's block"
    corrected = load_run(pair["honest"].out.with_name("crt2"))
    if corrected:
        why += f"; crt2: {_gain(corrected, 'honest')[1]}"
    held = [reaches(gain, math.log(1.022)) for gain, _ in gains]
    return judged_pair(pair, held, why, [said for _, said in gains])


def _gain(run: Run, protocol: str) -> tuple[float, str]:
    """How many nats lower the exit before the last is, and that in PPL with its interval."""
    last, before = (loss_of(run, "valid", protocol, place) for place in (-1, -2))
    gain, row = last - before, row_with_interval(run, protocol, -2)
    said = f"{abs(math.expm1(gain)):.1%} {'better' if gain > 0 else 'worse'}"
    if row and row["minus_low"] < 0 < row["minus_high"]:
        said += ", no larger than its interval"
    elif row:
        low, high = sorted(abs(math.expm1(-row[name])) for name in ("minus_high", "minus_low"))
        said += f" [{low:.1%}, {high:.1%}]"
    return gain, said


def gap(results: Path) -> Judged:
    """How much more is lost on test than on valid."""
    pair = scored_pair(results)
    losses = [
        [loss_of(run, split, protocol, -1) for split in ("valid", "test")]
        for protocol, run in pair.items()
    ]
    gaps = [test / valid - 1 for valid, test in losses]
    nats = " and ".join(f"{test - valid:+.3f}" for valid, test in losses)
    why = (
        "how much larger the last exit's loss is on test than on valid; the paper calls a "
        f"difference below 0.15 nats excellent, here they are {nats}"
    )
    held = [abs(gap - 0.242) <= NEAR for gap in gaps]
    return judged_pair(pair, held, why, [f"{gap:+.1%}" for gap in gaps])


def _searched(results: Path) -> list[dict[str, Any]]:
    return table(results, "small/search.csv", UNSEARCHED)


def ratio_to_linear(results: Path, variant: str, claimed: float) -> Judged:
    """How many times less a variant of Table 3 loses than the linear one."""
    rows = {row["variant"]: row for row in searched_table_3(_searched(results))}
    if not {"linear", variant} <= set(rows):
        raise Untested(UNSEARCHED)
    linear, own = rows["linear"], rows[variant]
    ratios = {kind: linear[kind] / own[kind] for kind in ("symmetric", "causal", "crt2")}
    symmetric, causal, crt2 = (
        f"{linear[kind]:.2f} to {own[kind]:.2f}, "
        + (f"{ratio:.3g} times less" if ratio >= 1 else "more")
        for kind, ratio in ratios.items()
    )
    return Judged(
        verdict(reaches(ratios["symmetric"], claimed), reaches(ratios["causal"], claimed)),
        f"the loss of linear over that of {variant}, 3 loops, d = 128; with the leak, and "
        f"without; in crt2 {crt2}",
        symmetric,
        causal,
        "small",
        min(linear["seeds"], own["seeds"]),
    )


def best_as_it_is(results: Path, base: str, changes: Sequence[str]) -> Judged:
    """That every change of an arm of the paper's block raises the loss by more than the noise.

    `base` and `changes`: what follows the recipe in the names of the arms. Untested where a change
    was not tuned as the arm was, or has one seed.
    """
    rows, tables = _searched(results), []
    for recipe in ("paper", "crt2"):
        try:
            tables.append(worth(rows, recipe + base, [recipe + arm for arm in changes]))
        except InputError as error:
            raise Untested(UNSEARCHED) from error
        if len(tables[-1]) <= len(changes):
            raise Untested(UNSEARCHED)
    (start, *paper), (_, *crt2) = tables
    said, of_crt2 = ("; ".join(map(in_words, of)) for of in (paper, crt2))
    found = set(map(finding, paper))
    if "better" not in found and {ONE_SEED, NO_VERDICT} & found:
        raise Untested(f"an ablation has one seed, or one rate was tried for it: {said}")
    trained = [row for row in paper if math.isfinite(row["loss"])]  # what broke is worse
    return Judged(
        verdict("better" not in found and all(row["low"] > 0 for row in trained)),
        f"nats per token above `{start['arm']}`, d = 128, 150 updates. In crt2: {of_crt2}",
        honest=said,
        profile="small",
        seeds=min(row["seeds"] for row in tables[0]),
    )


def against_gpt2(results: Path) -> Judged:
    """The PPL against that of a GPT-2, both trained here."""
    unsearched = "the baselines have not been searched"
    rows = table(results, "small/search_documents.csv", unsearched)
    ratios = [*_ppl_ratios(rows, "paper, d = 160"), *_ppl_ratios(rows, "crt2")]
    if len(ratios) < 4:
        raise Untested(unsearched)
    tuned, with_muon, crt2, crt2_muon = (
        f"{ratio:.2f}x [{low:.2f}, {high:.2f}]" for ratio, high, low in ratios
    )
    return Judged(
        verdict(reaches(ratios[0][0], 18)),
        "test PPL of a GPT-2 of equal parameters and tokens, its rate tuned, over that of the "
        f"paper's block made causal; {with_muon} where GPT-2 is trained with Muon. crt2, "
        f"which is: {crt2} and {crt2_muon}. The paper's 18x divides a sound PPL "
        "by one of a model that sees its targets",
        honest=tuned,
        profile="small",
        seeds=len({row["seed"] for row in rows if row["arm"] == "paper, d = 160"}),
    )


def _ppl_ratios(rows: list[dict[str, Any]], ours: str) -> list[list[float]]:
    """Token PPL of each GPT-2 over that of `ours`, and the ends of its interval, high and low."""
    own = [row for row in rows if (row["arm"], row["budget"]) == (ours, EQUAL_TOKENS)]
    compared = compare_arms(rows, ours, GPT2S, EQUAL_TOKENS) if own else []
    size, tokens = (sum(row[name] for row in own) for name in ("bytes", "tokens"))
    nats = math.log(2) * size / max(tokens, 1)  # a token, of a bit a byte
    ends = ("ours_minus", "low", "high")
    return [[math.exp(-nats * row[end]) for end in ends] for row in compared if "low" in row]


def published(results: Path, model: str, low: float, high: float) -> Judged:
    """A range that the paper gives for somebody else's model, against what was published."""
    unknown = "no published number is known to us, and its weights need a hub"
    rows = table(results, "published.csv", unknown)
    known = [row for row in rows if (row["model"], row["corpus"]) == (model, "wikitext-103")]
    if not known:
        raise Untested(unknown)
    held = [low * (1 - NEAR) <= row["ppl"] <= high * (1 + NEAR) for row in known]
    said = (f"{row['ppl']:g} a {row['unit']} ({row['source']})" for row in known)
    return Judged(
        HOLDS if all(held) else UNDERIVED if any(held) else FAILS,
        "the paper's range against what was published; it says neither whether the model was "
        "trained on WikiText-103 nor whether a word or a token is meant",
        honest="; ".join(said),
    )


def older_baselines(_: Path) -> Judged:
    """28.8 over the paper's own PPL."""
    return Judged(
        HOLDS if abs(28.8 / 1.08 / 43 - 1) <= NEAR else UNDERIVED,
        f"28.8 / 1.08 is {28.8 / 1.08:.0f}",
    )
