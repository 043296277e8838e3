"""Tables of the model that is handed out: its exits, what its teachers are worth, its speed."""

from pathlib import Path

import numpy as np
import pandas as pd

from crt_lib.exits.choice import choices_of
from crt_lib.exits.decode import LONGEST
from crt_lib.files import InputError
from crt_lib.runs.trained import find_checkpoint
from crt_lib.show.markdown import cells, table
from crt_lib.show.timed import taken
from crt_lib.study.sota import chosen, finished_run, measured_rows
from crt_lib.study.taught import ARMS, BEFORE, distilled_ppl

CLAIMED = 1.33  # the paper's speedup at no loss
NEARLY = 1.03  # times as fast is not clearly faster


def model_card(results: Path) -> str:
    """Every exit of the checkpoint that is handed out, `demo`."""
    run = finished_run(results / "demo")
    scored = pd.DataFrame(run.results).query("protocol == 'honest'").set_index(["split", "exit"])
    losses = pd.read_csv(run.out / "exits.csv").query("protocol == 'honest'").set_index("exit")
    valid, test = scored.loc["valid"], scored.loc["test"]
    costs = pd.DataFrame(measured_rows({"demo": run.out})).set_index(losses.index)
    columns = {
        "exit": losses.index,
        "multiply-adds": cells(costs["multiply_adds"] / 1e6, "{:.1f}M"),
        "valid, nats per token": cells(losses["loss"], "{:.3f} [")
        + cells(losses["low"], "{:.3f}, ")
        + cells(losses["high"], "{:.3f}]"),
        "valid word PPL": cells(valid["word_ppl"], "{:.1f}"),
        "test word PPL": cells(test["word_ppl"], "{:.1f}"),
        "test bits/byte": cells(test["bits_per_byte"], "{:.3f}"),
    }
    part, weights = run.manifest, chosen(run.metrics)
    return (
        f"{table(pd.DataFrame(columns))}\n\n"
        f"{part['parameters']:,} parameters. 95 % intervals over documents. Distilled for "
        f"{weights['update']:,} updates, {weights['tokens']:,} tokens, "
        f"{part['seconds'] / 60:.0f} minutes on {part['environment']['device']}, threads: "
        f"{part['environment']['torch_threads']}; "
        f"it began as {part['train']['origin']} (digests of checkpoints)."
    )


def distilled(results: Path) -> str:
    """What the exits of `demo` have of their teachers: beside the model before, and two others."""
    ppl = distilled_ppl(results)
    *_, last = ppl.columns
    runs = {said: finished_run(results / name).manifest for name, said in ARMS.items()}
    part = runs[ARMS["demo"]]["train"]
    made = pd.DataFrame({ppl.index.name: ppl.index}, index=ppl.index)
    made["updates"] = [runs[said]["train"]["updates"] if said in runs else 0 for said in ppl.index]
    for loop in ppl.columns:
        made[f"exit {loop}"] = cells(ppl[loop], "{:.1f}")
    made["exit 2 against its full depth"] = cells(ppl[2] / ppl[last] - 1, "{:+.2%}")
    made["full depth against before"] = cells(ppl[last] / ppl.loc[BEFORE, last] - 1, "{:+.2%}")
    return (
        f"{table(made)}\n\nWord perplexity on test by exit; updates of "
        f"{part['batch_size'] * part['seq_len']:,} tokens, the highest rate {part['max_lr']:g}.\n\n"
        f"{_promises(results)}\n\n{taken(_taken(results))}\n\n{_elsewhere(results)}\n\n"
        f"{_slots(results)}\n\n{_drafts(results)}"
    )


def _promises(results: Path) -> str:
    """`crt calibrate`: what each way was to lose at most, and what it lost on test."""
    choices = choices_of(find_checkpoint(results / "demo"))
    if choices is None:
        raise InputError("results/demo is not calibrated; run crt calibrate on it")
    tried = {**choices.ways, **choices.failed}.items()
    rows = [{"way": way, "kept": way in choices.ways, **vars(own)} for way, own in tried]
    found = pd.DataFrame(rows).dropna(subset="paid")  # what loses nothing has nothing to keep
    nats = ("above", "high", "paid", "paid_low", "paid_high")
    share = {of: cells(np.expm1(found[of]), "{:+.2%}") for of in nats}
    made = pd.DataFrame(
        {
            "way": found["way"].where(~found["way"].str.isdecimal(), "exit " + found["way"]),
            "kept": found["kept"].map({True: "yes", False: "no"}),
            "valid": share["above"] + ", at most " + share["high"],
            "test": share["paid"] + " [" + share["paid_low"] + ", " + share["paid_high"] + "]",
            "speed": cells(found["speedup"].where(found["kept"]), "{:.2f}x"),
        }
    )
    broken = found["way"][found["kept"] & (found["paid"] > np.log1p(choices.budget))]
    held = "all of them keep it" if broken.empty else f"it is broken by {', '.join(broken)}"
    return (
        f"{table(made)}\n\nThe promise is at most {choices.budget:+.1%} PPL per token: kept is "
        "what keeps it on valid with 95 % confidence, on documents that chose no threshold. On "
        f"test {held}. Ways that are not here are no cheaper than a fixed exit."
    )


def _elsewhere(results: Path) -> str:
    """What the exits lose on a text that nothing was trained or calibrated on."""
    ppl = _other_text(results)
    lost = ", ".join(f"exit {k} {above:+.1%}" for k, above in (ppl / ppl.iloc[-1] - 1).items())
    return (
        "The promise is of the text that it was calibrated on. On another, docstrings, of which "
        f"the model knows little (word PPL at full depth {ppl.iloc[-1]:,.0f}), against full depth: "
        f"{lost}."
    )


def _other_text(results: Path) -> "pd.Series[float]":
    """Word perplexity by exit."""
    return pd.read_csv(results / "demo" / "docstrings_test.csv").set_index("exit")["word_ppl"]


def _slots(results: Path) -> str:
    """`crt bench slots`: what rows at different loops at once could save."""
    rows = pd.read_csv(results / "demo" / "slots.csv")
    fixed = rows["policy"].str.match("full depth|exit ")
    found = rows[fixed | rows["way"].notna()].fillna({"way": ""})  # others take a fixed exit
    wide = found.pivot_table("speedup", ["policy", "way"], "rows", sort=False)
    first = found.groupby(["policy", "way"], sort=False).first()
    made = pd.DataFrame(
        {
            "policy": wide.index.get_level_values("policy"),
            "rows": wide.index.get_level_values("way"),
            "mean loops": cells(first["mean_loops"], "{:.2f}"),
            "PPL": cells(np.expm1(first["above"]), "{:+.2%}"),
        },
        index=wide.index,
    )
    timed = pd.read_csv(_taken(results)[0]).pivot_table("speedup", "policy", "rows")
    measured = timed.reindex(made["policy"]).set_axis(made.index)[list(wide.columns)]
    measured[made["rows"] == "slots"] = np.nan  # which nothing was built for
    for count in wide.columns:
        made[f"speed, {count} at a time"] = cells(wide[count], "{:.2f}x")
        made[f"measured, {count}"] = cells(measured[count], "{:.2f}x")
    return (
        f"{table(made)}\n\nSimulated from the measured costs of a loop and a head, on a trace of "
        f"test ({rows['device'][0]}, {rows['isa'][0]}, {rows['threads'][0]} thread): *waiting* for "
        "the deepest row, or in *slots*, where one that has left takes its next token at once "
        "(Relaxed Recursive Transformers, arXiv:2410.20672, propose it and estimate 2 to 3x). "
        "Asking, and gathering the rows' caches, is left out: these are bounds. Measured is "
        f"`crt bench exits`, on the same test text. {_slots_with_asking(wide, measured)}"
    )


def _slots_with_asking(wide: pd.DataFrame, measured: pd.DataFrame) -> str:
    """What slots would come to if they lost by asking what waiting loses by it."""
    said = []
    for count in wide.columns:
        lost = (measured[count] / wide[count]).xs("waiting", level="way")
        slots = (wide[count].xs("slots", level="way") * lost).dropna()
        best = slots.idxmax()
        fixed = measured.loc[("exit 2", ""), count]
        verb = "above" if slots[best] > fixed else "below"
        said.append(f"{best} {slots[best]:.2f}x at {count} rows, {verb} exit 2's {fixed:.2f}x")
    return (
        "If slots lose as much by asking as waiting does, the fastest policy in slots would be "
        f"{'; '.join(said)}."
    )


def _drafts(results: Path) -> str:
    """`crt bench drafts`: what self-speculation keeps, what a draft costs, and the bound."""
    rows = pd.read_csv(results / "demo" / "drafts.csv")
    drawn = np.where(rows["temperature"] == 0, "greedy", "drawn")
    places = rows.filter(regex=r"^kept_[1-4]$")
    made = pd.DataFrame(
        {
            "drafts by": "exit " + rows["draft_loop"].astype(str) + ", " + drawn,
            "kept at 1, 2, 3, 4": places.apply(
                lambda row: " ".join("" if np.isnan(x) else f"{x:.2f}" for x in row), axis=1
            ),
            "tokens per verification": cells(rows["tokens"], "{:.2f}"),
            "ms of full depth": cells(rows["ms_full"], "{:.2f}"),
            "ms = a + b drafted": cells(rows["ms_verify"], "{:.2f}")
            + cells(rows["ms_draft"], " + {:.2f} n"),
            "speed": cells(rows["speedup"], "{:.2f}x [")
            + cells(rows["low"], "{:.2f}, ")
            + cells(rows["high"], "{:.2f}]"),
            "if all were kept": cells(rows["bound"], "{:.2f}x"),
        }
    )
    first, most = rows.iloc[0], rows["bound"].max()
    share = (rows["ms_verify"] / rows["ms_full"]).mean()
    return (
        f"Self-speculation, lossless, one text at a time ({first['texts']} passages of "
        f"test, {first['new_tokens']} new tokens, {first['device']}, {first['isa']}, "
        f"{first['threads']} thread):\n\n{table(made)}\n\nKept: of the drafts that reach a place. "
        "The seconds of a verification are fitted: a, and b for each of n drafted tokens. The "
        f"speed is full depth's ms by the tokens, over a + b n. If {LONGEST} drafts were always "
        f"kept it would be {most:.2f}x at most. A verification alone costs as much as {share:.1f} "
        "tokens of full depth: its loops run through the modules, a token's through a step made "
        "for one."
    )


def exits_headline(results: Path) -> str:
    """What exits are good for, by `demo`; raises InputError where that is no longer true."""
    ppl = distilled_ppl(results)
    *_, last = ppl.columns
    before, two = ppl.loc[BEFORE], ppl.loc[ARMS["demo"]]
    rows = pd.concat(map(pd.read_csv, _taken(results))).query("policy == 'exit 2'")
    slow, fast, most = rows["speedup"].min(), rows["speedup"].max(), rows.iloc[-1]
    small = [results / "small" / "crt2" / "taken.csv", results / "bench" / "avx2" / "taken.csv"]
    asked = pd.concat(map(pd.read_csv, [*_taken(results), *small])).query("asks > 0")
    if asked["over_fixed"].max() > NEARLY:
        raise InputError("a criterion beats the best fixed exit: README says that none does")
    if slow < CLAIMED or most["low"] > 0 or two[last] >= before[last]:
        raise InputError("exit 2 of results/demo is not what README says of it: rewrite it")
    other = _other_text(results)
    # nats per word by nats per token, as the exits of the same text have them
    scored = pd.DataFrame(finished_run(results / "demo").results)
    full = scored.query(f"protocol == 'honest' and split == 'test' and exit == {last}").iloc[0]
    words = np.log(full["word_ppl"]) / full["loss"]
    apart = " to ".join(f"{np.expm1(most[end] * words):+.1%}" for end in ("low", "high"))
    return (
        f"**What exits are good for.** Taught by two models (`crt distil`), exit 2 of {last} is "
        f"{slow:.2f} to {fast:.2f} times as fast as full depth. On the same tokens of WikiText-2 "
        f"it changes the perplexity per word by {apart}; at full depth that is "
        f"{two[last]:.1f}, and was {before[last]:.1f} before. There the paper's \"{CLAIMED}x at no "
        'loss" can be had: by one early exit for every token, not by asking each '
        "([measured](results/README.md#exits-that-are-taught)). On text of another kind exit 2 "
        f"changes it by {other[2] / other[last] - 1:+.1%}. `results/demo` is that model."
    )


def _taken(results: Path) -> list[Path]:
    return [results / "demo" / "taken.csv", results / "bench" / "avx2" / "taken_demo.csv"]
