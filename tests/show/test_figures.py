"""The figures of the notebooks show every row, exit and policy that they are given."""

import io
import math

import matplotlib
import numpy as np
import pytest
import torch
from drawn import texts
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread

from crt_lib import CRT, ModelConfig, causality_report
from crt_lib.bench.exits import MIX, ORACLE
from crt_lib.exits import perloop
from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.exits.trace import apply_policy, oracle
from crt_lib.show import comparisons, diagrams, figures, picture, plots

TINY = ModelConfig(
    vocab_size=50, d_model=16, n_heads=2, n_loops=2, n_cycles=1, n_embed_cycles=1, exit_loops=(1,)
)


def test_architecture_follows_the_configuration():
    symmetric = ModelConfig(causal=False, n_loops=5, exit_loops=(3,), trm="linear", norm="rms")
    drawn = " | ".join(texts(diagrams.architecture(symmetric)))
    assert "applied 5 times" in drawn and "rms norm" in drawn
    assert "head of loop 3" in drawn and "head of loop 8" not in drawn
    assert "conv" not in drawn
    assert "pads left" in " | ".join(texts(diagrams.architecture(ModelConfig())))
    conv = diagrams.architecture(symmetric.replace(trm="conv"))
    assert "pads both sides" in " | ".join(texts(conv))


def test_causality_matrices_say_which_model_leaks():
    torch.manual_seed(0)
    reports = {
        str(causal): causality_report(CRT(TINY.replace(causal=causal)), 50, length=6)
        for causal in (True, False)
    }
    drawn = texts(diagrams.causality_matrices(reports, loop=1))
    assert {"True: nothing above the diagonal", "False: sees the future"} <= drawn


def test_curves_draw_every_exit_and_tolerate_one_row():
    rows = [
        {"update": 1, "tokens": 10, "lr": 1e-3, "loss": 2.0, "loss_1": 2.5, "loss_2": 1.5},
        {"update": 1, "tokens": 10, "valid_loss_1": 2.6, "valid_loss_2": 1.6},
    ]
    figure = figures.training_curves(rows, floor=1.5)
    for axes, last in zip(figure.axes, (1.5, 1.6), strict=True):
        drawn = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
        assert drawn == {"exit 1": last + 1, "exit 2": last, "entropy rate": 1.5}


def test_exits_have_lines_of_their_own_and_the_title_names_the_lowest():
    rows = [{"tokens": i, "loss_1": 3.0, "loss_2": 2.0, "valid_loss_1": 3.0} for i in (1, 2)]
    rows.append({"tokens": 3, "valid_loss_1": 2.5, "valid_loss_2": 2.6})
    left, right = figures.training_curves(rows).axes
    assert len({line.get_linestyle() for line in left.lines}) == 2
    assert right.get_title("left") == "Validation text: exit 1 ends lowest"


def test_the_page_is_drawn_over_the_training_of_the_same_updates():
    trained = [
        {"update": 1, "loss": 3.0, "loss_1": 3.5, "loss_2": 2.5},
        {"update": 2, "loss": 2.0, "loss_2": 1.5},  # this update trained one exit
    ]
    page = [row | {key: row[key] + 1 for key in row if "_" in key} for row in trained]
    (axes,) = figures.same_updates(page, trained).axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[1, 3.5]], [[1, 4.5]], [[1, 2.5], [2, 1.5]], [[1, 3.5], [2, 2.5]]]


def test_a_training_is_drawn_by_its_last_exit_where_it_ran():
    metrics = [{"tokens": i, "loss": 5.0, "loss_9": 6.0, "loss_12": 4.0 - i} for i in range(3)]
    short = {"tokens": 3, "loss": 5.0, "loss_9": 1.0}  # an update that did not run all loops
    runs = {"paper": metrics, "crt2": [*metrics, short, {"tokens": 3, "valid_loss_12": 1.0}]}
    figure = figures.training_losses(runs)
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[4.0, 3.0, 2.0]] * 2


def test_the_explorers_picture_marks_the_policy(scored):
    trace = scored[2]
    curves = {name: perloop.frontier(trace, name) for name in CRITERIA}
    outcome = apply_policy(trace, Policy(fixed=1))
    figure = picture.exit_view(trace.loops, curves, outcome, None)
    (point,) = figure.axes[0].collections[-1].get_offsets().tolist()
    assert point == pytest.approx([outcome.multiply_adds / 1e6, outcome.token_ppl])
    assert "100%" in texts(figure)
    (ax,) = figures.frontiers(curves, {"exit 1": outcome, "full depth": outcome}).axes
    assert len(ax.lines) == len(CRITERIA) + 1 and "exit 1" in texts(ax.figure)
    drawn = {line.get_label(): line for line in ax.lines}
    for name in CRITERIA:  # a look of its own, the same in every figure
        assert drawn[name].get_color() == plots.policy_look(name)["color"]
    assert len({tuple(plots.policy_look(name).values()) for name in CRITERIA}) == len(CRITERIA)


def test_the_frontier_says_what_costs_nothing(scored):
    trace = scored[2]
    outcomes = {"full depth": apply_policy(trace, Policy())}
    outcomes |= {f"exit {n}": apply_policy(trace, Policy(fixed=n)) for n in trace.loops[:-1]}
    least, most = ({"multiply_adds": c, "loss": outcomes["full depth"].loss} for c in (1, 1e12))
    curves = {"gate": [most], "margin": [least]}
    (title,) = (ax.get_title("left") for ax in figures.frontiers(curves, outcomes).axes)
    named = title.removeprefix("Cheaper than full depth and no worse: ").split(", ")
    full = outcomes.pop("full depth")
    assert named == [*(n for n, o in outcomes.items() if o.loss <= full.loss), "margin"]


def test_shares_have_the_numbers_of_their_exits(scored):
    trace = scored[2]
    one = apply_policy(trace, Policy(fixed=trace.loops[0]))
    figure = figures.exit_shares(
        {"margin": one, "gate": apply_policy(trace, Policy())}, trace.loops
    )
    assert "2 of 2 calibrated criteria take one exit for all tokens" in texts(figure)
    numbers = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert numbers == [str(trace.loops[0]), str(trace.loops[-1])]


def test_depth_says_where_the_loss_is_least():
    rows = [
        {"loops": n, "loss": loss, "trained": n < 3, "cosine": 1 - 0.1 / n, "kl": 0.1 / n}
        for n, loss in enumerate((3.0, 2.0, 2.5), 1)
    ]
    left, right = figures.depth_past_training(rows).axes
    assert left.get_title("left") == "The loss is least after 2 loops"
    assert right.get_title("left") == "Each loop moves the state less"
    rows[-1]["kl"] = 1.0
    assert "less" not in figures.depth_past_training(rows).axes[1].get_title("left")


def test_the_quick_picture_is_the_slow_one(scored):
    trace = scored[2]
    curves = {name: perloop.frontier(trace, name) for name in CRITERIA}
    outcomes = [oracle(trace), *(apply_policy(trace, Policy(fixed=n)) for n in trace.loops)]
    quick = picture.ExitPicture(trace, curves, "margin")

    def pixels(png):
        return imread(io.BytesIO(png))

    for outcome in outcomes[:2]:
        slow = picture.exit_view(trace.loops, curves, outcome, "margin")
        slow.axes[0].update_datalim([(o.multiply_adds / 1e6, o.token_ppl) for o in outcomes])
        slow.axes[0].autoscale_view()
        file = io.BytesIO()
        with matplotlib.rc_context(plots.STYLE):
            slow.savefig(file, dpi=80)
        assert np.abs(pixels(quick.png(outcome)) - pixels(file.getvalue())).max() < 0.02
    assert (pixels(quick.png(outcomes[0])) != pixels(quick.png(outcomes[1]))).any()


def test_what_changes_are_worth():
    rows = [
        {"arm": "crt2", "loss": 5.0},
        {"arm": "crt2, rms norm", "loss": 4.9, "adds": -0.1, "low": -0.2, "high": -0.05},
        {"arm": "crt2, no norm", "loss": math.inf, "adds": math.inf, "low": 0.0, "high": 0.0},
        {"arm": "crt2, kernel 5", "loss": 5.01, "adds": 0.01, "low": None, "high": None},
        {"arm": "crt2, batch norm", "loss": 5.2, "adds": 0.2, "low": 0.1, "high": 0.3},
    ]
    rows = [row | {"alike": row["arm"] != "crt2, batch norm"} for row in rows]
    figure = comparisons.worth({"crt2": rows})
    shown = texts(figure)
    assert {"rms norm", "-0.100", "kernel 5", "+0.010", "batch norm"} <= shown
    assert "crt2: 1 better, 1 broke, 1 of one seed, 1 not tuned" in shown
    assert "no norm" not in shown
    colors = figure.axes[0].collections[-1].get_facecolors()[:, :3].tolist()
    assert colors == [list(to_rgb(c)) for c in (plots.BLUE, plots.GREY, plots.GREY)]


def test_with_and_without_the_leak():
    row = {"paper": 1.9, "symmetric": 4.7, "deployable": 7.3, "causal": 6.9, "crt2": 5.5}
    figure = comparisons.with_and_without({"conv": row, "depthwise_mlp": row | {"paper": None}})
    first, second = figure.axes[0].lines
    assert first.get_ydata().tolist() == [1.9, 4.7, 7.3, 6.9, 5.5]
    assert math.isnan(second.get_ydata()[0]) and first.get_linestyle() == "None"


def test_quality_against_cost():
    rows = [
        {"model": "crt2", "parameters": 1.5e6, "multiply_adds": 2.8e6, "bits_per_byte": 1.5},
        {"model": "GPT-2", "parameters": 2.4e6, "multiply_adds": 2.7e6, "bits_per_byte": 1.6},
        {"model": "same", "parameters": 2.4e6, "multiply_adds": 2.7e6, "bits_per_byte": 1.6},
    ]
    figure = comparisons.quality(rows, {"crt2": {1: 1.6, 2: 1.5}})
    assert {"crt2", "GPT-2", "same", "Lowest after equal tokens: crt2, 1.500"} <= texts(figure)
    left, _, right = figure.axes
    assert left.collections[0].get_offsets().tolist() == [[1.5, 1.5], [2.4, 1.6], [2.4, 1.6]]
    assert right.lines[0].get_xydata().tolist() == [[1, 1.6], [2, 1.5]]


def test_scorings_tell_who_sees_the_token():
    rows = [
        {"name": "leaks", "ppl": 1.025, "sees": True},
        {"name": "alone", "ppl": 16226.4, "sees": False},
    ]
    figure = comparisons.scorings(rows)
    assert {"leaks", "alone", "1.025", "16,226"} <= texts(figure)
    first, second = figure.axes[0].collections[0].get_facecolors().tolist()
    assert first != second


def test_exits_in_time_have_a_mark_for_each_policy_and_its_mix():
    def row(policy, rows, speedup, above, loops, asks=0.0):
        named = {"policy": policy, "rows": rows, "mean_loops": loops, "asks": asks}
        return named | {"speedup": speedup, "above": above}

    rows = []
    for n in (1, 8):
        rows += [row("full depth", n, 1.0, 0.0, 4), row("exit 1", n, 2.0, 0.1, 1)]
        rows += [row("gate", n, 1.3, 0.01, 2.5, asks=1.5), row(f"{MIX}gate", n, 1.4, 0.02, 2.5)]
        rows.append(row(ORACLE, n, 1.5, -0.2, 2.0))
        rows.append(
            row("exit 3", n, 1.1 * n, -0.01, 3) if n > 1 else row("exit 3", n, 1.1, 0.02, 3)
        )
    figure = figures.exits_in_time(rows)
    assert [ax.get_title("left") for ax in figure.axes] == [
        "1 text at a time: no exit\nis faster without loss",
        "8 texts at a time: exit 3 is\n8.8 times as fast, no loss here",
    ]
    for ax in figure.axes:
        color = plots.policy_look("gate")["color"]
        points = [
            tuple(of.get_offsets()[0])
            for of in ax.collections
            if len(of.get_offsets()) and to_hex(of.get_edgecolors()[0]) == to_hex(color)
        ]
        assert points == [
            (1.3, pytest.approx(1.005, abs=0.01)),
            (1.4, pytest.approx(2.02, abs=0.01)),
        ]
        (fixed,) = ax.lines
        assert list(fixed.get_xdata())[::2] == [2.0, 1.0]  # by depth
    said = "hollow: a random mix of fixed exits, as deep"
    assert {"exit 1: 2.00x, +11 %\noracle: 1.50x, -18 %", said} <= texts(figure)
