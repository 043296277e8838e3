"""Measured runs beside published numbers: every value comes from a file."""

from pathlib import Path

import pytest

from crt_lib import InputError, load_profile
from crt_lib.audit.accounting import multiply_adds
from crt_lib.checkpoint import read_state
from crt_lib.files import read_rows, write_json
from crt_lib.runs.run import load_run
from crt_lib.study.sota import (
    SCORINGS,
    WAYS,
    attempt_curves,
    attempt_rows,
    best_at_cost,
    chosen,
    ends,
    leak_rows,
    measured_rows,
    published_rows,
    trainings,
)

RESULTS = Path(__file__).parents[2] / "results"


def test_measured_rows_are_those_of_the_run():
    folder = RESULTS / "small" / "crt2"
    rows = measured_rows({"crt2": folder})
    run = load_run(folder)
    stored = {
        row["exit"]: row
        for row in run.results
        if (row["split"], row["protocol"]) == ("test", "honest")
    }
    assert [row["model"] for row in rows] == [f"crt2, loop {loop}" for loop in stored]
    for loop, row in zip(stored, rows, strict=True):
        assert row["word_ppl"] == stored[loop]["word_ppl"]
        config = load_profile("small").model.replace(vocab_size=8192)
        assert row["multiply_adds"] == sum(multiply_adds(config, 256, (loop,)).values())
        assert row["parameters"] == run.manifest["parameters"]
    best, scored = read_state(folder / "checkpoints/best.safetensors"), chosen(run.metrics)
    assert [scored[name] for name in ("update", "tokens")] == [best["update"], best["tokens"]]
    assert scored["loss"] == best["best"] and rows[0]["tokens_seen"] == best["tokens"]
    with pytest.raises(InputError, match="no finished run"):
        measured_rows({"nothing": RESULTS / "nothing"})


def test_where_a_run_ends_is_in_its_files():
    run = load_run(RESULTS / "small/crt2")
    found = ends(run)
    assert found["chosen"] == min(row["valid_loss_4"] for row in run.metrics if "loss" not in row)
    stored = read_rows(RESULTS / "small/crt2/exits.csv")
    (valid,) = (row["loss"] for row in stored if (row["protocol"], row["exit"]) == ("honest", 4))
    assert found["valid"] == pytest.approx(valid)
    updates = [row for row in run.metrics if row["update"] > 4000 and "loss" in row]
    assert found["trained"] == pytest.approx(sum(row["loss_4"] for row in updates) / 500)


def test_trainings_of_a_kind_are_counted(tmp_path):
    ours, theirs = load_profile("small").model, load_profile("small", "gpt2").model
    made = [ours, ours.replace(n_loops=3, exit_loops=(1, 2)), ours.replace(vocab_size=9)]
    made += [theirs, theirs.replace(n_layers=7), load_profile("small", "paper").model]
    for number, config in enumerate(made):
        write_json(tmp_path / str(number) / "config.json", {"model": config.to_dict()})
    counts = [trainings(tmp_path, config.to_dict()) for config in made]
    assert counts == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("corpus", ["wikitext-2", "wikitext-103"])
def test_published_rows_name_their_source(corpus):
    rows = published_rows(RESULTS / "published.csv", corpus)
    known = [row for row in read_rows(RESULTS / "published.csv") if row["corpus"] == corpus]
    assert len(rows) == len(known) > 3
    for row in rows:
        assert row["source"] and (row["word_ppl"] is None) != (row["token_ppl"] is None)


def test_the_best_at_a_cost():
    rows = [
        {"name": name, "cost": cost, "bits_per_byte": bits}
        for name, cost, bits in (("a", 1, 2.0), ("b", 2, 2.1), ("c", 2, 1.9), ("d", 3, 1.9))
    ]
    assert [row["name"] for row in best_at_cost(rows, "cost")] == ["a", "c"]


def test_leak_rows_are_those_of_the_runs():
    rows = leak_rows(RESULTS / "small")
    assert [row["name"] for row in rows] == [name for _, _, name in SCORINGS]
    for (folder, protocol, _), row in zip(SCORINGS, rows, strict=True):
        stored = read_rows(RESULTS / "small" / folder / "results.csv")
        of_kind = [r for r in stored if (r["split"], r["protocol"]) == ("valid", protocol)]
        assert row["ppl"] == max(of_kind, key=lambda r: r["exit"])["token_ppl"]
    assert [row["sees"] for row in rows] == [True, True] + [False] * (len(rows) - 2)
    with pytest.raises(InputError, match="no finished run"):
        leak_rows(RESULTS / "nothing")


def honest(file, split):
    kind = (split, "honest")
    (ppl,) = (r["word_ppl"] for r in read_rows(file) if (r["split"], r["protocol"]) == kind)
    return ppl


def test_attempts_are_the_finished_runs_each_in_the_ways_it_was_scored(tmp_path):
    words = RESULTS / "small" / "words"
    rows, curves = attempt_rows(words), attempt_curves(words)
    found = {(row["model"], row["way"]): row for row in rows}
    for folder in words.iterdir():
        files = {"as trained": folder / "results.csv"}
        for prefix, way in WAYS.items():
            if (folder / f"{prefix}_test.csv").is_file():
                files[way] = folder / f"{prefix}_test.csv"
        for way, file in files.items():
            row = found.pop((folder.name, way))
            assert row["test"] == honest(file, "test") and row["parameters"] <= 33e6
        tokens, ppl = curves[folder.name][-1]
        assert tokens == row["tokens_seen"] / 1e6
        assert ppl == pytest.approx(honest(folder / "results.csv", "valid"), rel=0.2)  # its start
    assert not found
    (tmp_path / "unfinished").mkdir()
    assert attempt_rows(tmp_path) == []
