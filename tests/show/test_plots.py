"""The figures hold the data they are given, and are files worth committing."""

import os

import numpy as np
import pytest
import torch
from closeness import SAME
from matplotlib.image import imread

from crt_lib import (
    CRT,
    InputError,
    ModelConfig,
    causality_report,
    load_corpus,
    load_tokenizer,
    tokenize,
)
from crt_lib.audit.accounting import parameters_by_part
from crt_lib.data import PaddedLines
from crt_lib.files import read_rows
from crt_lib.show import diagrams, plots
from crt_lib.text import stats as datastats

STORED = plots.results_folder("small")

TINY = ModelConfig(
    vocab_size=50, d_model=16, n_heads=2, n_loops=2, n_cycles=1, n_embed_cycles=1, exit_loops=(1,)
)


def texts(figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


@pytest.fixture(scope="module")
def grammar():
    corpus = load_corpus("grammar")
    return tokenize(corpus, load_tokenizer("word", corpus))


def test_a_saved_figure_is_small_and_the_same_twice(tmp_path):
    figure = plots.parts_of_models({"tiny": parameters_by_part(TINY)}, "parameters")
    assert plots.save_figure(figure, tmp_path, "parts") is figure
    path = tmp_path / "figures" / "parts.png"
    first, modified = path.read_bytes(), path.stat().st_mtime_ns
    again = plots.parts_of_models({"tiny": parameters_by_part(TINY)}, "parameters")
    plots.save_figure(again, tmp_path, "parts")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (first, modified)
    assert [p.name for p in path.parent.iterdir()] == ["parts.png"]
    assert figure.dpi <= 150 and imread(path).shape[1] <= 1100


def test_the_loops_of_a_model_have_colours_of_their_own():
    assert len({plots.loop_color(loop) for loop in range(1, 9)}) == 8


def test_architecture_follows_the_configuration():
    symmetric = ModelConfig(causal=False, n_loops=5, exit_loops=(3,), trm="linear", norm="rms")
    drawn = texts(diagrams.architecture(symmetric))
    assert "applied 5 times" in drawn and "rms norm" in drawn
    assert "head of loop 3" in drawn and "head of loop 8" not in drawn
    assert "conv" not in drawn
    assert "pads left" in texts(diagrams.architecture(ModelConfig()))
    assert "pads both sides" in texts(diagrams.architecture(symmetric.replace(trm="conv")))


def test_causality_matrices_say_which_model_leaks():
    torch.manual_seed(0)
    reports = {
        str(causal): causality_report(CRT(TINY.replace(causal=causal)), 50, length=6)
        for causal in (True, False)
    }
    drawn = texts(plots.causality_matrices(reports, loop=1))
    assert "True: nothing above the diagonal" in drawn and "False: sees the future" in drawn


def test_curves_draw_every_exit_and_tolerate_one_row():
    rows = [
        {"update": 1, "tokens": 10, "lr": 1e-3, "loss": 2.0, "loss_1": 2.5, "loss_2": 1.5},
        {"update": 1, "tokens": 10, "valid_loss_1": 2.6, "valid_loss_2": 1.6},
    ]
    figure = plots.training_curves(rows, floor=1.5)
    for axes, last in zip(figure.axes, (1.5, 1.6), strict=True):
        drawn = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
        assert drawn == {"exit 1": last + 1, "exit 2": last, "entropy rate": 1.5}
    plots.schedule_and_speed(rows, [{"update": 1, "seconds": 1.0, "tokens_per_second": 10.0}])


def test_the_page_is_drawn_over_the_training_of_the_same_updates():
    trained = [
        {"update": 1, "loss": 3.0, "loss_1": 3.5, "loss_2": 2.5},
        {"update": 2, "loss": 2.0, "loss_2": 1.5},  # this update trained one exit
    ]
    page = [row | {key: row[key] + 1 for key in row if "_" in key} for row in trained]
    (axes,) = plots.same_updates(page, trained).axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[1, 3.5]], [[1, 4.5]], [[1, 2.5], [2, 1.5]], [[1, 3.5], [2, 2.5]]]


def test_statistics_count_every_line_and_the_padding_of_the_released_rows(grammar):
    lengths = np.array([len(line) for line in grammar.train.lines])
    rows = datastats.line_length_rows(grammar)
    assert sum(row["lines"] for row in rows) == len(lengths)
    assert rows[0]["lines"] == ((lengths >= 1) & (lengths <= 16)).sum()
    batch = PaddedLines(grammar.valid.lines, 384, len(grammar.valid.lines), 0, eot_id=-1).batch(
        0, 0
    )
    share = float((batch.inputs == -1).double().mean())
    assert datastats.data_rows(grammar)[1]["padding_share"] == pytest.approx(share, **SAME)


def test_statistics_that_are_not_there_say_how_to_make_them(tmp_path):
    with pytest.raises(InputError, match="write_statistics"):
        datastats.read_statistics(tmp_path)


@pytest.mark.skipif("CRT_DATA_ROOT" not in os.environ, reason="CRT_DATA_ROOT is not set")
def test_the_stored_counts_are_those_of_wikitext_2(tmp_path):
    datastats.write_statistics(tmp_path, tokenizers=["word"])
    for name in ("data.csv", "line_lengths.csv"):
        stored = [row for row in read_rows(STORED / name) if row["tokenizer"] == "word"]
        assert read_rows(tmp_path / name) == stored
