"""Trained side by side: alike but for the padding of the convolutions."""

import math

from crt_lib import load_profile, plots
from crt_lib.ablations import PAPER_TABLE_3, table_3, train_both
from crt_lib.runs import load_data

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
    figure = plots.below_the_floor({name: made.metrics for name, made in both.items()}, 1.5)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["symmetric", "causal", "entropy of the text"]


def test_table_3_has_every_variant(tmp_path):
    rows = table_3(SHORT, load_data(SHORT), tmp_path)
    assert [row["variant"] for row in rows] == list(PAPER_TABLE_3)
    for row in rows:
        assert all(math.isfinite(row[kind]) for kind in ("symmetric", "causal", "deployable"))
        if row["variant"] == "linear":  # nothing to leak through
            assert row["symmetric"] == row["causal"]
