"""How the paper's claims are judged: a function a rule, from the files under results/ alone.

A judge returns the cells of its row, `verdict` and those of `claims.COLUMNS` that it has, and what
the claim's `why` leaves open. It raises Untested where nothing was measured.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crt_lib.audit.accounting import parameters_by_part
from crt_lib.audit.compare import compare_arms
from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.files import InputError, read_rows
from crt_lib.runs.run import Run, load_run
from crt_lib.study import ablations
from crt_lib.study.ladder import EQUAL_TOKENS
from crt_lib.study.sota import exits_of

HOLDS, LEAK, FAILS = "holds", "holds only under the leak", "does not hold"
UNDERIVED, UNTESTED = "not derivable", "not tested"
VERDICTS = (HOLDS, LEAK, FAILS, UNDERIVED, UNTESTED)
LARGEST_FIRST = ("paper", "small")  # the smaller ones are made anew wherever the notebooks run
NEAR = 0.1  # of the paper's value: what counts as the same
UNSEARCHED = "the ablations have not been searched"
GPT2S = ("GPT-2 112 x 4", "GPT-2 112 x 4, muon")  # of equal parameters
Judged = dict[str, Any]


class Untested(Exception):
    """Nothing measures a claim; the message says why."""


def verdict(*held: bool) -> str:
    """That of what is so as released and honestly, or of what was only asked honestly."""
    return HOLDS if held[-1] else LEAK if held[0] else FAILS


def reaches(found: float, claimed: float) -> bool:
    """Whether a value that should be large is as large as claimed, less a tenth."""
    return found >= claimed * (1 - NEAR)


def _table(results: Path, name: str, why: str) -> list[dict[str, Any]]:
    """The rows of a measured file; raises Untested, which says `why`, without it."""
    path = results / name
    if not path.is_file():
        raise Untested(why)
    return read_rows(path)


def _pair(results: Path) -> dict[str, Run]:
    """The released block and the same made causal, by the protocol that each is scored by.

    At the largest profile that has both; raises Untested where none has.
    """
    for profile in LARGEST_FIRST:
        released, paper = (load_run(results / profile / name) for name in ("released", "paper"))
        if released and paper:
            return {"released": released, "honest": paper}
    raise Untested("no profile has a finished run of both recipes, released and paper")


def _of_pair(pair: dict[str, Run], held: list[bool], said: list[str], **why: Any) -> Judged:
    """What was found of them: whether it holds of each, their values, and more for `why`."""
    cells = dict(zip(pair, said, strict=True)) | {"seeds": 1} | why
    return cells | {"verdict": verdict(*held), "profile": pair["honest"].out.parent.name}


def _exit_row(rows: list[dict[str, Any]], place: int, protocol: str, **kind: str) -> dict[str, Any]:
    """The row of the `place`-th exit (-1: the last); raises Untested without it."""
    own = exits_of(rows, protocol, **kind)
    if not -len(own) <= place < len(own):
        raise Untested("these runs have no such exit or protocol")
    return own[place]


def _loss(run: Run, split: str, protocol: str, place: int) -> float:
    """Of an exit, nats a position."""
    return _exit_row(run.results, place, protocol, split=split)["loss"]


def _on_valid(run: Run, protocol: str, place: int) -> dict[str, Any] | None:
    """The row of an exit in the run's exits.csv, with intervals; None where none was kept."""
    path = run.out / "exits.csv"
    row = _exit_row(read_rows(path), place, protocol) if path.is_file() else None
    return row if row and row["low"] is not None else None


def perplexity(results: Path, split: str, place: int, paper: float) -> Judged:
    """The PPL of an exit: near the paper's, or better?"""
    pair, held, said = _pair(results), [], []
    for (protocol, run), form in zip(pair.items(), (".3f", ".1f"), strict=True):
        ppl = math.exp(_loss(run, split, protocol, place))
        row = _on_valid(run, protocol, place) if split == "valid" else None
        low, high = (math.exp(row[end]) if row else ppl for end in ("low", "high"))
        held.append(ppl <= paper * (1 + NEAR))
        said.append(f"PPL {ppl:{form}}" + (f" [{low:{form}}, {high:{form}}]" if row else ""))
    leaking = math.exp(_loss(pair["released"], split, "honest", place))
    alone = math.exp(_loss(pair["released"], "valid", "deployable", place))
    return _of_pair(pair, held, said, leaking=leaking, alone=alone)


def last_exit_is_worse(results: Path) -> Judged:
    """That the exit before the last has the lower PPL, by 2.2 %."""
    pair = _pair(results)
    gains = [_gain(run, protocol) for protocol, run in pair.items()]
    corrected = load_run(pair["honest"].out.with_name("crt2"))
    crt2 = f"; crt2: {_gain(corrected, 'honest')[1]}" if corrected else ""
    held = [reaches(gain, math.log(1.022)) for gain, _ in gains]
    return _of_pair(pair, held, [said for _, said in gains], crt2=crt2)


def _gain(run: Run, protocol: str) -> tuple[float, str]:
    """How many nats lower the exit before the last is, and that in PPL with its interval."""
    last, before = (_loss(run, "valid", protocol, place) for place in (-1, -2))
    gain, row = last - before, _on_valid(run, protocol, -2)
    said = f"{abs(math.expm1(gain)):.1%} {'better' if gain > 0 else 'worse'}"
    if row and row["minus_low"] < 0 < row["minus_high"]:
        said += ", no larger than its interval"
    elif row:
        low, high = sorted(abs(math.expm1(-row[name])) for name in ("minus_high", "minus_low"))
        said += f" [{low:.1%}, {high:.1%}]"
    return gain, said


def gap(results: Path) -> Judged:
    """How much more is lost on test than on valid."""
    pair, gaps, nats = _pair(results), [], []
    for protocol, run in pair.items():
        valid, test = (_loss(run, split, protocol, -1) for split in ("valid", "test"))
        gaps.append(test / valid - 1)
        nats.append(f"{test - valid:+.3f}")
    held = [abs(gap - 0.242) <= NEAR for gap in gaps]
    return _of_pair(pair, held, [f"{gap:+.1%}" for gap in gaps], nats=" and ".join(nats))


def ratio_to_linear(results: Path, variant: str, claimed: float) -> Judged:
    """How many times less a variant of Table 3 loses than the linear one."""
    searched = ablations.searched_table_3(_table(results, "small/search.csv", UNSEARCHED))
    rows = {row["variant"]: row for row in searched}
    if not {"linear", variant} <= set(rows):
        raise Untested(UNSEARCHED)
    linear, own = rows["linear"], rows[variant]
    ratios = {kind: linear[kind] / own[kind] for kind in ("symmetric", "causal", "crt2")}
    said = {
        kind: f"{linear[kind]:.2f} to {own[kind]:.2f}, "
        + (f"{ratio:.3g} times less" if ratio >= 1 else "more")
        for kind, ratio in ratios.items()
    }
    return {
        "verdict": verdict(*(reaches(ratios[kind], claimed) for kind in ("symmetric", "causal"))),
        "released": said["symmetric"],
        "honest": said["causal"],
        "crt2": said["crt2"],
        "seeds": min(linear["seeds"], own["seeds"]),
    }


def best_as_it_is(results: Path, base: str, changes: Sequence[str]) -> Judged:
    """That every change of an arm of the paper's block raises the loss by more than the noise.

    `base` and `changes`: what follows the recipe in the names of the arms. Untested where a change
    was not tuned as the arm was, or has one seed.
    """
    rows, tables = _table(results, "small/search.csv", UNSEARCHED), []
    for recipe in ("paper", "crt2"):
        try:
            arms = [recipe + change for change in changes]
            tables.append(ablations.worth(rows, recipe + base, arms)[1:])
        except InputError as error:
            raise Untested(UNSEARCHED) from error
        if len(tables[-1]) < len(changes):
            raise Untested(UNSEARCHED)
    paper = tables[0]
    said, of_crt2 = ("; ".join(map(ablations.in_words, of)) for of in tables)
    found = set(map(ablations.finding, paper))
    if "better" not in found and {ablations.ONE_SEED, ablations.NO_VERDICT} & found:
        raise Untested(f"an ablation has one seed, or one rate was tried for it: {said}")
    # what broke is worse
    worse = all(row["low"] > 0 for row in paper if math.isfinite(row["loss"]))
    return {
        "verdict": verdict("better" not in found and worse),
        "honest": said,
        "crt2": of_crt2,
        "seeds": min(row["seeds"] for row in paper),
    }


def against_gpt2(results: Path) -> Judged:
    """The PPL against that of a GPT-2, both trained here."""
    unsearched = "the baselines have not been searched"
    rows = _table(results, "small/search_documents.csv", unsearched)
    ratios, said = [], []
    for ours in ("paper, d = 160", "crt2"):
        own = [row for row in rows if (row["arm"], row["budget"]) == (ours, EQUAL_TOKENS)]
        compared = compare_arms(rows, ours, GPT2S, EQUAL_TOKENS) if own else []
        size, tokens = (sum(row[name] for row in own) for name in ("bytes", "tokens"))
        for row in (row for row in compared if "low" in row):
            nats = -math.log(2) * size / tokens  # a token, of a bit a byte
            ratio, high, low = (math.exp(nats * row[of]) for of in ("ours_minus", "low", "high"))
            ratios.append(ratio)
            said.append(f"{ratio:.2f}x [{low:.2f}, {high:.2f}]")
    if len(ratios) < 4:
        raise Untested(unsearched)
    return {
        "verdict": verdict(reaches(ratios[0], 18)),
        "honest": said[0],
        "others": said[1:],
        "seeds": len({row["seed"] for row in rows if row["arm"] == "paper, d = 160"}),
    }


def published(results: Path, model: str, low: float, high: float) -> Judged:
    """A range that the paper gives for somebody else's model, not saying what it is of, against
    what was published.
    """
    unknown = "no published number is known to us, and its weights need a hub"
    rows = _table(results, "published.csv", unknown)
    known = [row for row in rows if (row["model"], row["corpus"]) == (model, "wikitext-103")]
    if not known:
        raise Untested(unknown)
    held = [low * (1 - NEAR) <= row["ppl"] <= high * (1 + NEAR) for row in known]
    said = (f"{row['ppl']:g} a {row['unit']} ({row['source']})" for row in known)
    found = HOLDS if all(held) else UNDERIVED
    return {"verdict": found, "honest": "; ".join(said)}


def older_baselines(_: Path) -> Judged:
    """28.8 over the paper's own PPL."""
    ratio = 28.8 / 1.08
    return {"verdict": HOLDS if abs(ratio / 43 - 1) <= NEAR else UNDERIVED, "ratio": ratio}


def _ways(results: Path) -> dict[str, dict[str, Any]]:
    """The rows of `crt bench decode` of the paper's block, one text at a time, by the way."""
    name = "bench/decode_paper.csv"
    rows = _table(results, name, f"crt bench decode has not been run: {name}")
    return {row["way"]: row for row in rows if row["batch"] == 1}


def speedups(results: Path) -> Judged:
    """Measured decoding speeds of fixed exits against the counted ones."""
    claimed = {"exit 2": 4.0, "exit 4": 2.0, "exit 6": 8 / 6}
    ways = _ways(results)
    found = {way: ways[way]["speedup"] for way in claimed}
    return {
        "verdict": verdict(all(reaches(found[way], ratio) for way, ratio in claimed.items())),
        "honest": ", ".join(f"{way} {speedup:.2f}x" for way, speedup in found.items()),
    }


def thresholds(results: Path) -> Judged:
    """The paper's thresholds: 1.33x without loss? On the paper's block, and on crt2."""
    name, said_of = "small/crt2/taken.csv", "the paper's thresholds"
    taken = _table(results, name, f"crt bench exits has not been run: {name}")
    ours = {row["policy"]: row for row in taken if row["rows"] == 1}
    paper = _ways(results)
    # of crt2 the speed and the loss are of the same tokens
    worse = paper[said_of]["token_ppl"] / paper["full depth"]["token_ppl"] - 1
    held, said = [], []
    for rows, lost in ((paper, worse), (ours, math.expm1(ours[said_of]["above"]))):
        row, loops = rows[said_of], rows["full depth"]["mean_loops"]
        held.append(reaches(row["speedup"], 1.33) and lost <= 0.005)
        depth = f"{row['mean_loops']:.1f} of {loops:.0f} loops"
        said.append(f"{row['speedup']:.2f}x at {lost:+.1%} PPL, {depth}")
    return {
        "verdict": verdict(all(held)),
        "honest": f"the paper's block {said[0]}; crt2, on the tokens that are timed, {said[1]}",
    }


def _total(**changes: Any) -> int:
    return sum(parameters_by_part(ModelConfig().replace(**changes)).values())


def parameters(_: Path, claimed: float, of_gpt2: bool) -> Judged:
    """The parameters of Table 1; or how many more they are than GPT-2 Small's, as a share."""
    gpt2 = sum(parameters_by_part(GPT2Config()).values())
    totals = [_total(head_sharing=sharing) for sharing in ("separate", "shared_aux")]
    off = totals[0] / gpt2 - 1 - claimed if of_gpt2 else totals[0] / claimed - 1
    released, shared = (f"{n / gpt2 - 1:+.0%}" if of_gpt2 else f"{n:,}" for n in totals)
    found = {"released": released, "honest": f"{shared} with shared early heads"}
    return found | {"verdict": verdict(abs(off) <= 0.01)}


def embedding(_: Path) -> Judged:
    """What an embedding of half the width saves."""
    half, full = _total(head_sharing="tied"), _total(head_sharing="tied", embed_dim=512)
    saved = 1 - half / full
    sizes = {"half": half / 1e6, "full": full / 1e6}
    found = HOLDS if abs(saved - 0.329) <= 0.01 else UNDERIVED
    return sizes | {"verdict": found, "honest": f"{saved:.1%} fewer"}


def memory(results: Path) -> Judged:
    """What a training step needs."""
    rows = _table(results, "bench/train.csv", "crt bench train has not been run")
    released, ours = (
        max(r["peak_memory_bytes"] / 1e9 for r in rows if (r["rows"], r["side"]) == (2, side))
        for side in ("released", "ours")
    )
    said = {"released": f"{released:.2f} GB, on a CPU", "honest": f"{ours:.2f} GB, on a CPU"}
    return said | {"verdict": verdict(max(released, ours) <= 6)}
