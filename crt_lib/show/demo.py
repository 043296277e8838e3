"""Tables of the model that is handed out: its exits, what its teachers are worth, its speed."""

from pathlib import Path

import pandas as pd

from crt_lib.show.markdown import cells, table
from crt_lib.show.timed import taken
from crt_lib.study.sota import chosen, finished_run, measured_rows
from crt_lib.study.taught import ARMS, distilled_rows


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
        "valid, nats a token": cells(losses["loss"], "{:.3f} [")
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
        f"{part['seconds'] / 60:.0f} minutes on one thread of {part['environment']['device']}; "
        f"it began as {part['train']['origin']} (digests of checkpoints)."
    )


def distilled(results: Path) -> str:
    """What the exits of `demo` have of their teachers: beside the model before, and two others."""
    rows = distilled_rows(results).set_index(["learned_from", "exit"])
    wide = rows.unstack("exit").reindex(rows.index.unique("learned_from"))
    made = pd.DataFrame({"learns from": wide.index}, index=wide.index)
    for loop in rows.index.unique("exit"):
        made[f"exit {loop}"] = cells(wide["word_ppl"][loop], "{:.1f}")
    made["exit 2 against its full depth"] = cells(wide["above_full"][2], "{:+.2%}")
    last = rows.index.unique("exit")[-1]
    made["full depth against before"] = cells(wide["above"][last], "{:+.2%}")
    runs = {said: finished_run(results / name).manifest for name, said in ARMS.items()}
    updates = {said: run["train"]["updates"] for said, run in runs.items()}
    made.insert(1, "updates", [updates.get(said, 0) for said in made.index])
    part = runs[ARMS["demo"]]["train"]
    return (
        f"{table(made)}\n\nWord perplexity on test by exit; updates of "
        f"{part['batch_size'] * part['seq_len']:,} tokens, the highest rate {part['max_lr']:g}.\n\n"
        f"{taken([results / 'demo/taken.csv', results / 'bench/avx2/taken_demo.csv'])}"
    )
