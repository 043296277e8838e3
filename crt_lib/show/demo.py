"""Blocks about the model that is handed out: its exits, what its teachers are worth, its speed."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crt_lib.exits.choice import choices_of
from crt_lib.exits.speculate import LONGEST
from crt_lib.files import InputError
from crt_lib.runs.trained import find_checkpoint
from crt_lib.show.templates import render
from crt_lib.show.timed import foreseen, taken
from crt_lib.study.sota import chosen, finished_run, measured_rows
from crt_lib.study.taught import ARMS, BEFORE, distilled_ppl

CLAIMED = 1.33  # the paper's speedup at no loss
NEARLY = 1.03  # times as fast is not clearly faster
AIMED = {"exit 2": 1.6, "gate": 1.3, "drawn": 1.6}  # speeds, against full depth


def model_card(results: Path) -> str:
    """Every exit of the checkpoint that is handed out, `demo`."""
    run = finished_run(results / "demo")
    scored = pd.DataFrame(run.results).query("protocol == 'honest'").set_index(["split", "exit"])
    losses = pd.read_csv(run.out / "exits.csv").query("protocol == 'honest'").set_index("exit")
    rows = losses[["loss", "low", "high"]].join(scored.loc["test", ["word_ppl", "bits_per_byte"]])
    costs = pd.DataFrame(measured_rows({"demo": run.out})).set_index(losses.index)
    rows = rows.assign(valid=scored.loc["valid", "word_ppl"], multiply_adds=costs["multiply_adds"])
    return render("card", rows=rows, part=run.manifest, weights=chosen(run.metrics))


def distilled(results: Path) -> str:
    """What the exits of `demo` have of their teachers: beside the model before, and two others.

    Then what was promised of its ways to decode and what it came to on test, and on another text;
    what rows at different loops at once could save; and what speculation keeps and costs.
    """
    runs = {said: finished_run(results / name).manifest for name, said in ARMS.items()}
    return render(
        "distilled",
        learned=distilled_ppl(results),
        before=BEFORE,
        updates={said: run["train"]["updates"] for said, run in runs.items()},
        train=runs[ARMS["demo"]]["train"],
        taken=taken(_taken(results)),
        elsewhere=_other_text(results),
        held=pd.read_csv(results / "demo" / "elsewhere.csv"),
        foreseen=foreseen(results / "demo" / "foresight.csv", _taken(results)[:1]),
        drafts=(drafts := _drafts(results)),
        by_text=drafts.query("draft_loop == 0 and last == last.max()").set_index("temperature"),
        longest=LONGEST,
        words=_tokens_a_word(results),
        policies=_policies(results),
        **_promises(results),
        **_slots(results),
    )


def _promises(results: Path) -> dict[str, Any]:
    """`crt calibrate`: what each way was to lose at most, and what it lost on test."""
    choices = choices_of(find_checkpoint(results / "demo"))
    if choices is None:
        raise InputError("results/demo is not calibrated; run crt calibrate on it")
    tried = {**choices.ways, **choices.failed}
    return {
        "choices": choices,
        "promised": {way: own for way, own in tried.items() if own.paid is not None},
        "broken": [
            way for way, own in choices.ways.items() if (own.paid or 0) > np.log1p(choices.budget)
        ],
    }


def _other_text(results: Path) -> "pd.Series[float]":
    """Word perplexity by exit, of a text that nothing was trained or calibrated on."""
    return pd.read_csv(results / "demo" / "docstrings_test.csv").set_index("exit")["word_ppl"]


def _drafts(results: Path) -> pd.DataFrame:
    """`crt bench drafts`, and the speeds with AVX2 beside its own."""
    named = ["draft_loop", "last", "temperature"]
    own, avx2 = (
        pd.read_csv(results / path) for path in ("demo/drafts.csv", "bench/avx2/drafts_demo.csv")
    )
    columns = [*named, "speedup", "low", "high", "bound"]
    return own.merge(avx2[columns], on=named, suffixes=("", "_avx2"))


def _slots(results: Path) -> dict[str, Any]:
    """`crt bench slots`: what rows at different loops at once could save.

    `best`: the fastest policy by rows, if slots lost by asking what waiting loses by it. `off`:
    measured speeds by simulated ones, fixed and waiting; `gained`: in slots by waiting.
    """
    rows = pd.read_csv(results / "demo" / "slots.csv")
    fixed = rows["policy"].str.match("full depth|exit ")
    found = rows[fixed | rows["way"].notna()].fillna({"way": ""})  # others take a fixed exit
    wide = found.pivot_table("speedup", ["policy", "way"], "rows", sort=False)
    taken = pd.read_csv(_taken(results)[0])
    timed = taken.pivot_table("speedup", "policy", "rows")
    policies, ways = wide.index.get_level_values("policy"), wide.index.get_level_values("way")
    measured = timed.reindex(policies).set_axis(wide.index)[list(wide.columns)]
    measured[ways == "slots"] = np.nan  # which nothing was built for
    off, in_slots = measured / wide, wide.xs("slots", level="way")
    lost = off.xs("waiting", level="way")
    slots = (in_slots * lost).dropna()
    least = off.xs("", level="way").drop("full depth")
    best = {"policy": slots.idxmax(), "slots": slots.max(), "fixed": measured.loc["exit 2", ""]}
    against = {"over_fixed": "over_fixed", "low": "over_fixed_low", "high": "over_fixed_high"}
    beside = taken.set_index(["rows", "policy"]).loc[list(best["policy"].items())]
    best |= {name: beside[of].droplevel("policy") for name, of in against.items()}
    return {
        "simulated": wide,
        "first": found.groupby(["policy", "way"], sort=False).first(),
        "measured": measured,
        "best": pd.DataFrame(best),
        "off": {"fixed": least.to_numpy(), "waiting": lost.to_numpy()},
        "gained": (in_slots / wide.xs("waiting", level="way")).to_numpy(),
    }


def exits_headline(results: Path) -> str:
    """What exits are good for, by `demo`; raises InputError where that is no longer true."""
    ppl = distilled_ppl(results)
    *_, last = ppl.columns
    before, two = ppl.loc[BEFORE], ppl.loc[ARMS["demo"]]
    rows = pd.concat(map(pd.read_csv, _taken(results))).query("policy == 'exit 2'")
    small = [results / "small" / "crt2" / "taken.csv", results / "bench" / "avx2" / "taken.csv"]
    asked = pd.concat(map(pd.read_csv, [*_taken(results), *small])).query("asks > 0")
    if len(asked.query("over_fixed_low > @NEARLY")):
        raise InputError("a criterion is clearly faster than the best fixed exit: rewrite README")
    reached = int((rows.loc[rows["rows"] == 1, "speedup_low"] >= CLAIMED).sum())  # processors
    exit_2 = _policies(results).loc["exit 2"]
    if not reached or exit_2["low"] > 0 or two[last] >= before[last]:
        raise InputError("exit 2 of results/demo is not what README says of it: rewrite it")
    known = foreseen(results / "demo" / "foresight.csv", _taken(results))
    known = known.loc["what the best exit says"]
    if (speeds := known[[1, 8, 32]].to_numpy()).max() > 1.1:
        raise InputError("a rule that knows more is much faster than exit 2: rewrite README")
    greedy = _drafts(results).query("draft_loop == 0 and temperature == 0")
    drafted = greedy.set_index("last").loc[last]
    if min(drafted["low"], drafted["low_avx2"]) <= 1:
        raise InputError("the text's drafts are not surely faster: README says that they are")
    other = _other_text(results)
    words = _tokens_a_word(results)["test"]
    return render(
        "exits",
        last=last,
        speeds=rows["speedup"],
        change=two[2] / two[last] - 1,
        low=np.expm1(exit_2["low"] * words),
        high=np.expm1(exit_2["high"] * words),
        after=two[last],
        claimed=CLAIMED,
        reached=reached,
        elsewhere=other[2] / other[last] - 1,
        foreseen=speeds,
        drafted=drafted[["speedup", "speedup_avx2"]].astype(float),
        best=known["best"].iloc[0],
    )


def missed_bars(results: Path) -> str:
    """What was to be reached and was not, with its bound; InputError where it is reached."""
    tables = [pd.read_csv(path) for path in _taken(results)]
    both = pd.concat(tables).set_index("policy")
    drawn = _drafts(results).query("temperature > 0 and last == last.max()")
    speeds = drawn[["speedup", "speedup_avx2"]].to_numpy()
    alone, gates = both.loc["exit 2"].query("rows == 1"), both.loc["gate"].query("rows > 1")
    slots, budget = _slots(results), np.log1p(_promises(results)["choices"].budget)
    as_fast = alone["speedup"].max() >= AIMED["exit 2"] or speeds.max() >= AIMED["drawn"]
    by_gate = gates["over_fixed_low"].max() > 1 or gates["above"].min() <= budget
    if as_fast or by_gate or slots["gained"].max() > NEARLY:
        raise InputError("a bar is no longer missed as results/README.md says: rewrite that")
    ppl = distilled_ppl(results)
    *_, last = ppl.columns
    known = foreseen(results / "demo" / "foresight.csv", _taken(results))
    return render(
        "missed",
        aimed=AIMED,
        policies=_policies(results),
        alone=[_parts(table, AIMED["exit 2"]) for table in tables],
        gates=gates,
        gate=_promises(results)["promised"]["gate"],
        foreseen=known.loc["what the best exit says", [1, 8, 32]].to_numpy(),
        best=known["best"].iloc[0],
        simulated=slots["simulated"],
        speeds=speeds,
        by_exit=drawn.query("draft_loop > 0"),
        by_text=drawn.query("draft_loop == 0").iloc[0],
        own=ppl.loc[ARMS["distilled/own_written"]],
        two=ppl.loc[ARMS["demo"]],
        before=ppl.loc[BEFORE, last],
        last=last,
        asked=both.loc["the paper's thresholds"].query("rows > 1")["speedup"],
        told=both.loc["oracle"].query("rows > 1")["speedup"],
    )


def _parts(taken: pd.DataFrame, aimed: float) -> dict[str, Any]:
    """One text at a time: ms of a loop and of all else, and what that may take for exit 2 to be
    `aimed` times as fast as full depth.
    """
    rows = taken.query("rows == 1").set_index("policy")
    ms, loops = rows["ms"], rows.loc["full depth", "mean_loops"]
    loop = (ms["full depth"] - ms["exit 1"]) / (loops - 1)
    least = (loops - 2 * aimed) / (aimed - 1) * loop  # (rest + loops) / (rest + 2) = aimed
    return rows.loc["exit 2"].to_dict() | {"loop": loop, "rest": ms["exit 1"] - loop, "most": least}


def _policies(results: Path) -> pd.DataFrame:
    """Policies of `demo` by name, judged on the tokens of test that were traced."""
    return pd.read_csv(results / "demo" / "policies.csv").set_index("policy")


def _tokens_a_word(results: Path) -> "pd.Series[float]":
    """Tokens for a word of each split, as the exits of `demo` were scored on them."""
    scored = pd.DataFrame(finished_run(results / "demo").results).query("protocol == 'honest'")
    first = scored.drop_duplicates("split").set_index("split")
    return first["tokens"] / first["words"]


def _taken(results: Path) -> list[Path]:
    return [results / "demo" / "taken.csv", results / "bench" / "avx2" / "taken_demo.csv"]
