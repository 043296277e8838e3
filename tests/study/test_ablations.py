"""Trained side by side: alike but for the padding of the convolutions."""

import math

import numpy as np
import pytest
from tiny_rows import rows_of, walked

from crt_lib import InputError, load_profile
from crt_lib.files import read_rows
from crt_lib.runs.trained import load_data
from crt_lib.show import figures, plots
from crt_lib.study.ablations import (
    BUDGET,
    NO_VERDICT,
    PAPER_TABLE_3,
    RATES,
    finding,
    in_words,
    searched_table_3,
    taken_back,
    train_both,
    worth,
)
from crt_lib.study.ladder import LADDER
from crt_lib.study.search import summarise

SMOKE = load_profile("smoke", "paper")
SHORT = SMOKE.replace(train=SMOKE.train.replace(updates=2, eval_every=0))


def test_both_differ_in_nothing_else(tmp_path):
    data = load_data(SHORT)
    both = train_both(SHORT, data, "pair", tmp_path)
    symmetric, causal = (both[name].model.config for name in ("symmetric", "causal"))
    assert not symmetric.causal and causal.causal
    assert symmetric.replace(causal=True) == causal
    again = train_both(SHORT, data, "pair", tmp_path)
    assert again["causal"].metrics == both["causal"].metrics
    figure = figures.training_losses({name: made.metrics for name, made in both.items()}, 1.5)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["symmetric", "causal", "entropy of the text"]


def test_what_a_change_is_worth():
    rows = walked("paper", [6.00, 6.02, 6.04]) + walked("paper, better", [5.50, 5.52, 5.54], 4e-3)
    rows += walked("paper, alike", [6.01]) + walked("paper, broke", [math.inf])
    changes = ["paper, better", "paper, alike", "paper, broke", "paper, not run"]
    base, better, alike, broke = worth(rows, "paper", changes)
    assert base["loss"] == pytest.approx(6.02) and "adds" not in base
    assert better["seeds"] == 3 and better["adds"] == pytest.approx(-0.5)
    assert (better["rates"], better["max_lr"], base["max_lr"]) == (3, 4e-3, RATES["paper"])
    # Student's t with 2 degrees of freedom; five standard errors of a quantile of a million draws
    t, off, sampled = 4.303, (0.01, -0.02, 0.01), 5 * 0.012
    noisy = rows + walked("paper, noisy", [6.0 - o for o in off])
    (_, row) = worth(noisy, "paper", ["paper, noisy"])
    paired = [6.0 - o - b for o, b in zip(off, (6.00, 6.02, 6.04), strict=True)]
    assert row["adds"] == pytest.approx(np.mean(paired))
    spread = np.std(paired, ddof=1) / math.sqrt(3)
    for side in (row["adds"] - row["low"], row["high"] - row["adds"]):
        assert side == pytest.approx(t * spread, abs=sampled * spread)
    assert (alike["seeds"], alike["low"]) == (1, None) and alike["adds"] == pytest.approx(0.01)
    assert in_words(better).endswith("better") and in_words(alike).endswith("one seed")
    assert in_words(broke).endswith("broke") and in_words(row).endswith("no larger than the noise")
    wild = noisy + walked("paper, wild", [1.0, 9.0, 5.0])
    (_, again) = worth(wild, "paper", ["paper, noisy"])
    assert again == row  # another arm's spread is its own
    with pytest.raises(InputError, match="no rows of crt2"):
        worth(rows, "crt2", [])


@pytest.mark.parametrize("tuned", ["neither", "base", "change", "both"])
def test_there_is_no_verdict_where_a_rate_was_not_walked(tuned):
    """Of a rate that is the only one, or the lowest or highest of those tried.

    But where it is the one ahead that was not tuned, more rates can only bring it further.
    """
    names, losses = ("crt2", "crt2, worse"), ([5.0, 5.1], [5.4, 5.5])
    rows = []
    for kind, name, of in zip(("base", "change"), names, losses, strict=True):
        rows += (walked if tuned in (kind, "both") else rows_of)(name, of)
    (_, row) = worth(rows, "crt2", ["crt2, worse"])
    sure = tuned in ("both", "change")  # the base is ahead
    assert row["adds"] == pytest.approx(0.4) and row["alike"] is sure
    assert finding(row) == ("worse" if sure else NO_VERDICT)
    assert in_words(row) == f"crt2, worse: +0.400, {finding(row)}"
    edge = rows + rows_of("crt2, edge", [5.4, 5.5]) + rows_of("crt2, edge", [6.0], 1.0)
    assert finding(worth(edge, "crt2", ["crt2, edge"])[1]) == NO_VERDICT


def test_table_3_takes_each_arm_at_its_best_rate():
    rows = rows_of("paper, TRM linear", [5.0])  # not of all recipes
    for recipe, rates in (("released", (2e-3, 4e-3)), ("paper", (1e-3, 2e-3)), ("crt2", (1e-2,))):
        for place, rate in enumerate(rates):
            losses = [5.0 - place, 5.2 - place]
            rows += rows_of(f"{recipe}, TRM conv", losses, rate, seen=2.0 - place)
    (row,) = searched_table_3(rows)
    assert (row["variant"], row["paper"], row["seeds"]) == ("conv", PAPER_TABLE_3["conv"], 2)
    expected = {"symmetric": 1.0, "deployable": 4.1, "causal": 4.1, "crt2": 5.1}
    assert {kind: row[kind] for kind in expected} == pytest.approx(expected)
    assert row["rates"] == "paper:2 crt2:1 released:2"


def test_the_rates_are_the_tuned_ones():
    """Of what the search stored, for the unchanged recipes."""
    rows = read_rows(plots.results_folder("small") / "search.csv")
    for summary in summarise(rows, RATES, BUDGET):
        assert summary["max_lr"] == RATES[summary["arm"]]
        assert not summary["edge"]


def test_a_change_taken_back_is_paired_by_seed_at_the_best_rates():
    rows = rows_of("crt2", [5.0, 5.2], 1.0) + rows_of("crt2", [5.5], 2.0)
    for name in LADDER:
        rows += rows_of(f"without {name}", [5.1], 2.0)
    rows += rows_of("without muon", [9.0], 4.0) + rows_of("without rotary", [5.05, 5.05], 1.0)
    back = taken_back(rows)
    assert back["adds"]["muon"] == pytest.approx(0.1) and back["seeds"]["muon"] == 1
    assert back["adds"]["rotary"] == pytest.approx(-0.05) and back["seeds"]["rotary"] == 2
    assert back.index[-1] == "rotary" and set(back.index) == set(LADDER)
