"""`crt bench train` and `crt bench cost`: the rows they write, at toy size."""

import pytest
import torch
from tiny_models import TINY

from crt_lib import load_profile
from crt_lib.bench import step as benchstep
from crt_lib.bench.parts import PARTS
from crt_lib.bench.training import bench_training
from crt_lib.bench.trial import Trial
from crt_lib.runs.run import load_data

MADE_UP = Trial(
    [{"other": 2.0, "clipping": 0.5, "optimiser": 0.25}],
    {"precision": "fp32", "peak_memory_bytes": 10**9},
)


def test_two_sides_and_the_parts_of_ours(capfd):
    rows, parts = bench_training(TINY, load_data(load_profile("smoke")), 2, 32, 1, "fp32")
    released, ours = rows
    assert [row["side"] for row in rows] == ["released", "ours"]
    assert released["parameters"] == ours["parameters"] and 0 < released["useful_share"] < 1
    for row in rows:
        assert row["precision"] == "fp32" and 0 < row["mfu"] < 1 and row["peak_memory_bytes"] > 1e8
        assert row["threads"] == torch.get_num_threads() and row["isa"]
    assert [row["part"] for row in parts] == list(PARTS)
    timed = sum(row["seconds"] for row in parts)
    assert timed == pytest.approx(ours["seconds_per_step"])


def test_cost_changes_a_size_at_a_time(monkeypatch):
    asked = []

    def trial(model, train, seconds, threads):
        assert model.d_model % 32 == 0 and train.seq_len <= model.max_seq_len
        asked.append((train.batch_size, train.seq_len, model.n_loops, model.d_model, threads))
        return MADE_UP

    monkeypatch.setattr(benchstep, "try_random", trial)
    rows = benchstep.bench_cost(1.0)
    assert len(set(asked)) == len(asked) == len(rows)
    base = tuple(benchstep.BASE.values())
    assert {threads for *_, threads in asked} == {1, torch.get_num_threads()}
    for *size, _ in asked:
        assert sum(a != b for a, b in zip(size, base, strict=True)) <= 1
    first = rows[0]
    assert first["tokens_per_second"] == round(first["batch"] * first["length"] / 2.75, 1)


def test_the_optimisers_share_counts_the_micro_batches(monkeypatch):
    monkeypatch.setattr(benchstep, "try_random", lambda *_: MADE_UP)
    adamw, muon = benchstep.bench_updates(["paper"])
    assert (adamw["optimizer"], muon["optimizer"]) == ("adamw", "muon")
    assert adamw["micro_batches"] == 8 and adamw["update_ms"] == 1000 * (8 * 2.0 + 0.5 + 0.25)
    assert adamw["optimizer_share"] == pytest.approx(0.25 / 16.75, abs=1e-4)
