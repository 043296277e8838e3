"""Tables of trained models: the exits of `crt2`, what it is held against, its words."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crt_lib.audit.compare import compare_arms
from crt_lib.files import InputError, read_rows
from crt_lib.runs.run import Run
from crt_lib.show.markdown import cells, table
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

    Means over the runs of a recipe: `small/<recipe>`, and those of other seeds (SEEDS).
    """
    small = results / "small"
    runs = {name: finished_run(small / name) for name in RUNS}
    scores = _scores(small, runs)
    means = scores.groupby(level=["name", "split", "protocol", "exit"]).mean(numeric_only=True)
    counts = {name: trainings(small, run.manifest["model"]) for name, run in runs.items()}
    body = []
    for name, said in RUNS.items():
        valid, test = means.xs((name, "valid", "honest")), means.xs((name, "test", "honest"))
        costs = pd.DataFrame(measured_rows({said: small / name})).set_index(test.index)
        columns = {
            "exit": costs["model"],
            "parameters": cells(costs["parameters"] / 1e6, "{:.2f}M"),
            "multiply-adds": cells(costs["multiply_adds"] / 1e6, "{:.1f}M"),
            "tokens seen": cells(costs["tokens_seen"] / 1e6, "{:.1f}M"),
            "trainings": counts[name],
            "valid word PPL": cells(valid["word_ppl"], "{:.1f}"),
            "test word PPL": cells(test["word_ppl"], "{:.1f}"),
            "test token PPL": cells(test["token_ppl"], "{:.1f}"),
            "test bits/byte": cells(test["bits_per_byte"], "{:.3f}"),
        }
        shown = slice(None) if name == "crt2" else slice(-1, None)
        body.append(pd.DataFrame(columns)[shown])
    part = runs["crt2"].manifest
    notes = "; ".join(_training(name, run, scores) for name, run in runs.items())
    return (
        f"{table(pd.concat(body))}\n\n"
        f"{part['tokenizer']} tokens of {part['corpus']}, on {part['environment']['device']}. "
        f"{notes}. Multiply-adds: per token, up to that exit and with its head alone. Tokens "
        "seen: by the weights that are scored, of the first seed; the other seeds' were not kept. "
        "Trainings: all that were made of its kind at this size, other seeds, rates and numbers of "
        f"loops included. {_gains_and_gaps(scores, counts)}\n\n{_chosen_and_fitted(runs)}"
    )


def _chosen_on(run: Run) -> str:
    """The text whose loss chose the weights that are scored."""
    tokens = run.manifest["train"]["eval_tokens"]
    return f"the first {tokens:,} tokens of valid" if tokens else "all of valid"


def _chosen_and_fitted(runs: dict[str, Run]) -> str:
    """`crt2` and the GPT-2 of its multiply-adds: where weights were chosen, on valid, trained."""
    ours, theirs = (ends(runs[name]) for name in ("crt2", "gpt2_7_layers"))
    apart = {text: f"{ours[text] - theirs[text]:+.3f}" for text in ours}
    every = runs["crt2"].manifest["train"]["eval_every"]
    return (
        f"The weights were chosen on {_chosen_on(runs['crt2'])}. There `crt2`, the first seed, "
        f"minus the GPT-2 of its multiply-adds is {apart['chosen']} nats per token, on all "
        "of valid "
        f"{apart['valid']}. In training, a mean over the last {every} updates, it is "
        f"{apart['trained']}: {ours['trained']:.3f} and {theirs['trained']:.3f}, where valid has "
        f"{ours['valid']:.3f} and {theirs['valid']:.3f}."
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
    minutes, cores = took["seconds"].sum() / 60, took["cpu_count"][0]
    return (
        f"**Fixed.** Made causal, the paper's block has a word perplexity of "
        f"{ppl['paper']:.0f} on the test text of WikiText-2. The corrected recipe `crt2` has "
        f"{ppl['crt2']:.0f}, with {ours['parameters'] / paper['parameters']:.0%} of the "
        f"parameters and {ours['tokens_seen'] / paper['tokens_seen']:.1f} times the tokens.\n\n"
        f"**Cost.** `make reproduce` runs every notebook on a laptop: {minutes:.0f} minutes on "
        f"{cores} cores, {took['peak_memory_bytes'].max() / 1e9:.0f} GB of memory."
    )


def _training(name: str, run: Run, scores: pd.DataFrame) -> str:
    """What a row's training saw and took."""
    seeds = list(scores.xs(name).index.unique("seed"))
    threads = run.manifest["environment"]["torch_threads"]
    several = len(seeds) > 1
    return (
        f"{RUNS[name]}: update {chosen(run.metrics)['update']:,} of "
        f"{run.metrics[-1]['update']:,}, "
        f"{'mean of seeds' if several else 'seed'} {', '.join(seeds)}, "
        f"{run.manifest['seconds'] / 60:.0f} minutes on "
        f"{'one thread' if threads == 1 else f'{threads} threads'}"
        f"{f' for seed {seeds[0]}' if several else ''}"
    )


def _gains_and_gaps(scores: pd.DataFrame, counts: dict[str, int]) -> str:
    """Bits per byte: of each loop of `crt2`, between its seeds, and to the GPT-2s."""
    bits = scores["bits_per_byte"].xs(("test", "honest"), level=("split", "protocol"))
    by_exit = {name: bits[name].unstack("exit") for name in RUNS}  # seeds, exits
    ours = by_exit["crt2"]
    gains = ", ".join(f"{-gain:.3f}" for gain in ours.mean().diff()[1:])
    gaps = []
    for name in ("gpt2", "gpt2_7_layers"):
        theirs = by_exit[name].iloc[:, -1].to_numpy()
        pairs = np.subtract.outer(ours.iloc[:, -1].to_numpy(), theirs)
        spread = f"{pairs.min():+.3f} to {pairs.max():+.3f} over the pairs of seeds"
        if len(theirs) == 1:
            spread = "one seed" + ", its rate not tuned" * (counts[name] == 1)
        gaps.append(f"minus the {RUNS[name]} {pairs.mean():+.3f} ({spread})")
    return (
        f"Each further loop of `crt2` reduces bits per byte by: {gains}. At an exit its seeds "
        f"are at most {(ours.max() - ours.min()).max():.3f} bits apart. "
        f"At full depth `crt2` {'; '.join(gaps)}."
    )


def words(results: Path) -> str:
    """The best on valid of the attempts with WikiText-2's own words, beside the published LSTM."""
    attempts = attempt_rows(results / "small" / "words")
    attempts = [row for row in attempts if row["valid"] is not None]
    if not attempts:
        raise InputError(f"no finished run in {results / 'small' / 'words'}; `crt train`")
    best = min(attempts, key=lambda row: row["valid"])
    published = published_rows(results / "published.csv", "wikitext-2")
    lstm = next(row for row in published if row["model"] == "AWD-LSTM")
    return (
        f"With the text's own {best['vocabulary']:,} words, the best on valid of "
        f"{len({row['model'] for row in attempts})} trainings and the ways to score them "
        f"({best['model']}, {best['way']}; {best['parameters'] / 1e6:.1f}M parameters, "
        f"{best['tokens_seen'] / best['text']:.1f} times through the text) has a word perplexity "
        f"of {best['test']:.1f} on test. Published, {lstm['model']} with "
        f"{lstm['parameters'] / 1e6:.0f}M: {lstm['word_ppl']:g} ({lstm['source']})."
    )


def recipe_comparison(results: Path) -> str:
    """`crt2` against the paper's block and GPT-2 of its size: bits per byte, with intervals."""
    path = results / "small" / "search.csv"
    rows, documents = read_rows(path), read_rows(documents_file(path))
    names = ["crt2", *arms()["baselines"], "1 loop"]  # the last: are loops worth their time?
    tables, parameters = [], dict[str, int]()
    for title, budget in (("equal tokens", EQUAL_TOKENS), ("equal time", EQUAL_TIME)):
        parameters |= {row["arm"]: row["parameters"] for row in summarise(rows, names, budget)}
        head = [f"test bits/byte, {title}", "`crt2` minus it, 95 % interval"]
        compared = compare_arms(documents, "crt2", names[1:], budget)
        body = {row["arm"]: (f"{row['bits_per_byte']:.3f}", _difference(row)) for row in compared}
        tables.append(pd.DataFrame.from_dict(body, orient="index", columns=head))
    made = pd.concat(tables, axis=1)
    made.insert(0, "parameters", [f"{parameters[name] / 1e6:.2f}M" for name in made.index])
    made.insert(1, "trainings", made.index.map(pd.DataFrame(rows)["arm"].value_counts()))
    made.insert(0, "arm", made.index)
    seeds = ", ".join(map(str, sorted({row["seed"] for row in documents})))
    first = next(row for row in rows if row["budget"] == EQUAL_TOKENS)
    return (
        f"{table(made)}\n\n"
        f"Seeds {seeds}; updates of {first['tokens'] // first['updates']:,} tokens; equal tokens: "
        f"{EQUAL_TOKENS}; equal time: {EQUAL_TIME}. Trainings: all in the search, whatever "
        f"their rate, seed and length; altogether {tried(rows)}.\n\n{_largest_steps(rows)}"
    )


def _largest_steps(rows: list[dict[str, Any]]) -> str:
    """The three largest steps from `paper` to `crt2`, and each change taken back from `crt2`."""
    _, *ladder = arms()["ladder"]  # `released` is scored otherwise: what it sees is no step
    said = []
    for title, budget in (("equal tokens", RUNG_TOKENS), ("equal time", RUNG_TIME)):
        taken = pd.Series(steps(summarise(rows, ladder, budget))).rename({"crt2": list(LADDER)[-1]})
        largest = ", ".join(f"{name} ({by:.2f})" for name, by in taken.nlargest(3).items())
        said.append(f"at {title} ({budget}): {largest}")
    back = taken_back(rows)
    alone = ", ".join(f"{name} ({by:+.2f})" for name, by in back["adds"].items())
    seeds = sorted({int(count) for count in back["seeds"]})
    return (
        "From the paper's block to `crt2`, a change at a time, these three take most off the "
        f"validation loss (nats per token), {'; '.join(said)}. A step depends on those before it: "
        "it is not what the change is worth, and steps of another order would differ. Taken back "
        f"alone from `crt2`, at {RUNG_TOKENS} and over {' or '.join(map(str, seeds))} seed"
        f"{'s' * (seeds != [1])}, it loses: {alone}."
    )


def _difference(row: dict[str, Any]) -> str:
    if "ours_minus" not in row:  # `crt2` itself
        return ""
    return f"{row['ours_minus']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
