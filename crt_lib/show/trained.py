"""Blocks about trained models: the exits of `crt2`, what it is held against, its words."""

from pathlib import Path

import numpy as np
import pandas as pd

from crt_lib.audit.compare import compare_arms
from crt_lib.files import InputError, read_rows
from crt_lib.runs.run import Run
from crt_lib.show.templates import render
from crt_lib.study.ablations import taken_back, tried
from crt_lib.study.ladder import EQUAL_TIME, EQUAL_TOKENS, LADDER, RUNG_TIME, RUNG_TOKENS, arms
from crt_lib.study.search import documents_file, steps, summarise
from crt_lib.study.sota import (
    attempt_rows,
    chosen,
    ends,
    finished_run,
    measured_rows,
    published_rows,
    trainings,
)

RUNS = {  # folder -> how its row is called
    "crt2": "`crt2`",
    "gpt2": "GPT-2 of its size",
    "gpt2_7_layers": "GPT-2 of its multiply-adds",
    "paper": "`paper`",
}
SEEDS = {"crt2": "seeds", "gpt2": "gpt2_seeds"}  # folder -> folder of its other seeds


def small_results(results: Path) -> str:
    """The small profile on WikiText-2: every exit of `crt2`, the last of the GPT-2s and of `paper`.

    Means over the runs of a recipe: `small/<recipe>`, and those of other seeds (SEEDS). Besides,
    in bits per byte, what each loop of `crt2` is worth, how far its seeds and the GPT-2s are apart;
    and how it and the GPT-2 of its multiply-adds fit the training text.
    """
    small = results / "small"
    runs = {name: finished_run(small / name) for name in RUNS}
    scores = _scores(small, runs)
    means = scores.groupby(level=["name", "split", "protocol", "exit"]).mean(numeric_only=True)
    counts = {name: trainings(small, run.manifest["model"]) for name, run in runs.items()}
    rows = []
    for name, called in RUNS.items():
        valid, test = (means.loc[name, split, "honest"] for split in ("valid", "test"))
        own = pd.DataFrame(measured_rows({called: small / name})).set_index(test.index)
        own = own.assign(trainings=counts[name], valid=valid["word_ppl"], **test)
        rows.append(own if name == "crt2" else own[-1:])
    bits = scores["bits_per_byte"].xs(("test", "honest"), level=("split", "protocol"))
    by_exit = {name: bits[name].unstack("exit") for name in RUNS}  # seeds, exits
    last = {name: own.iloc[:, -1].to_numpy() for name, own in by_exit.items()}
    return render(
        "small",
        rows=pd.concat(rows),
        runs=runs,
        called=RUNS,
        chosen=chosen,
        part=runs["crt2"].manifest,
        counts=counts,
        by_exit=by_exit,
        gaps={
            name: np.subtract.outer(last["crt2"], last[name]) for name in ("gpt2", "gpt2_7_layers")
        },
        ours=ends(runs["crt2"]),
        theirs=ends(runs["gpt2_7_layers"]),
    )


def _scores(small: Path, runs: dict[str, Run]) -> pd.DataFrame:
    """The rows of results.csv by name, seed, split, protocol and exit, other seeds included."""
    rows = {(name, str(run.manifest["train"]["seed"])): run.results for name, run in runs.items()}
    for name, folder in SEEDS.items():
        for path in sorted((small / folder).glob("*/results.csv")):
            rows[name, path.parent.name] = read_rows(path)
    tables = {key: pd.DataFrame(found) for key, found in rows.items()}
    scores = pd.concat(tables, names=["name", "seed"]).droplevel(-1)
    return scores.set_index(["split", "protocol", "exit"], append=True).sort_index()


def fixed_and_cost(results: Path) -> str:
    """What the corrected recipe reaches beside the paper's, and what running it all takes.

    Raises InputError where `crt2` is not ahead with fewer parameters.
    """
    small = results / "small"
    runs = {name: finished_run(small / name) for name in ("paper", "crt2")}
    scores = _scores(small, runs)["word_ppl"].groupby(["name", "split", "protocol", "exit"]).mean()
    ppl = {name: scores[name, "test", "honest"].iloc[-1] for name in runs}
    paper, ours = (measured_rows({name: small / name})[-1] for name in runs)
    if ppl["crt2"] >= ppl["paper"] or ours["parameters"] >= paper["parameters"]:
        raise InputError("results/small/crt2 is not what README says of it: rewrite it")
    took = pd.read_csv(results / "notebooks.csv")
    return render("fixed", ppl=ppl, paper=paper, ours=ours, took=took)


def words(results: Path) -> str:
    """The best on valid of the attempts with WikiText-2's own words, beside the published LSTM."""
    attempts = attempt_rows(results / "small" / "words")
    attempts = [row for row in attempts if row["valid"] is not None]
    if not attempts:
        raise InputError(f"no finished run in {results / 'small' / 'words'}; `crt train`")
    best = min(attempts, key=lambda row: row["valid"])
    published = published_rows(results / "published.csv", "wikitext-2")
    lstm = next(row for row in published if row["model"] == "AWD-LSTM")
    return render("words", best=best, trainings=len({row["model"] for row in attempts}), lstm=lstm)


def recipe_comparison(results: Path) -> str:
    """`crt2` against the paper's block and GPT-2 of its size: bits per byte, with intervals.

    Besides, the three largest steps from `paper` to `crt2`, and each change taken back from `crt2`.
    """
    path = results / "small" / "search.csv"
    rows, documents = read_rows(path), read_rows(documents_file(path))
    names = ["crt2", *arms()["baselines"], "1 loop"]  # the last: are loops worth their time?
    compared, parameters = [], dict[str, int]()
    for budget in (EQUAL_TOKENS, EQUAL_TIME):
        of_budget = compare_arms(documents, "crt2", names[1:], budget)
        compared.append({row["arm"]: row for row in of_budget})
        tuned = {row["arm"]: row["parameters"] for row in summarise(rows, names, budget)}
        parameters |= {arm: tuned[arm] for arm in compared[-1]}
    _, *ladder = arms()["ladder"]  # `released` is scored otherwise: what it sees is no step
    taken = {
        f"{title} ({budget})": pd.Series(steps(summarise(rows, ladder, budget)))
        for title, budget in (("equal tokens", RUNG_TOKENS), ("equal time", RUNG_TIME))
    }
    first = next(row for row in rows if row["budget"] == EQUAL_TOKENS)
    return render(
        "recipe",
        compared=compared,
        parameters=parameters,
        trainings=pd.DataFrame(rows)["arm"].value_counts(),
        seeds=sorted({row["seed"] for row in documents}),
        batch=first["tokens"] // first["updates"],
        tokens=EQUAL_TOKENS,
        time=EQUAL_TIME,
        tried=tried(rows),
        steps={said: own.rename({"crt2": list(LADDER)[-1]}) for said, own in taken.items()},
        rung=RUNG_TOKENS,
        back=taken_back(rows),
    )
