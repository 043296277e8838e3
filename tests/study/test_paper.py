"""The paper's tables beside ours: each number is the one of its file, in the paper's place."""

import math
from pathlib import Path

import pandas as pd
import pytest

from crt_lib import InputError
from crt_lib.runs.run import load_run
from crt_lib.show.paperplots import figure_2, figure_3
from crt_lib.study import paper
from crt_lib.study.analysis import PAPER_TABLE_2

SMALL = Path(__file__).resolve().parents[2] / "results/small"


def test_table_1_counts_what_the_configurations_are():
    table = paper.table_1(SMALL)
    assert list(table.loc["recursive loops"]) == ["8", "8", "8", "4"]
    assert list(table.loc["total parameters"])[:3] == ["~92M", "143.5M", "92.1M"]
    made = load_run(SMALL / "crt2").manifest["parameters"]
    assert table.loc["total parameters", "crt2, small"] == f"{made / 1e6:.1f}M"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_losses_are_those_of_the_runs(split):
    losses = paper.losses(SMALL, split)
    assert list(losses.index) == list(PAPER_TABLE_2)
    for name, (folder, protocol) in paper.RUNS.items():
        rows = pd.read_csv(SMALL / folder / "results.csv")
        rows = rows[(rows["split"] == split) & (rows["protocol"] == protocol)]
        assert list(losses[name]) == pytest.approx(list(rows["loss"]))


def test_table_2_has_the_paper_first_and_full_depth_as_the_unit():
    table = paper.table_2(SMALL)
    assert list(table["paper"]) == [ppl for _, ppl, _ in PAPER_TABLE_2.values()]
    assert math.log(table.loc[8, "crt2"]) == pytest.approx(paper.losses(SMALL).loc[8, "crt2"])
    speeds = paper.speeds(SMALL)
    assert (speeds.loc[8] == 1).all() and (speeds.xs("speed", axis=1, level=1) >= 1).all(axis=None)
    timed = pd.read_csv(SMALL / "crt2/decode.csv").query("batch == 1").set_index("way")["speedup"]
    assert table.loc[2, "speed, crt2"] == pytest.approx(timed["exit 1"])


def test_tables_3_and_4_have_a_row_for_each_of_the_papers():
    third, fourth = paper.table_3(SMALL), paper.table_4(SMALL)
    assert list(third.index)[:4] == ["linear", "conv", "conv_linear", "depthwise"]
    assert third["seeds"].min() >= 3
    assert fourth.loc["GPT-2 Small", "published"] and not fourth.loc["GPT-2 Small", "crt2"]
    crt = [model for model in fourth.index if model.startswith("CRT")]
    loss = paper.losses(SMALL, "test").loc[6, "causal"]
    assert float(fourth.loc[crt[1], "causal"]) == pytest.approx(math.exp(loss), rel=1e-3)


def test_the_figures_show_every_column():
    ppl = paper.losses(SMALL).map(math.exp)
    shares = pd.DataFrame({1: [0.25, 0.0], 2: [0.75, 1.0]}, index=["gate", "all"])
    curves = {"crt2": load_run(SMALL / "crt2").metrics}
    axes = figure_2(curves, ppl, shares, paper.speeds(SMALL)).axes
    assert [bar.get_width() for bar in axes[2].patches] == [0.25, 0.0, 0.75, 1.0]
    assert len(axes[3].collections) == 3
    for ax in figure_3(ppl.map(math.log)).axes:
        assert len(ax.lines) == len(paper.RUNS)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        paper.losses(tmp_path)
