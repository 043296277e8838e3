"""What each loop does: intervals, changed guesses, the lens, and depths that were not trained."""

import itertools

import numpy as np
import pytest
import torch
from closeness import SAME, roundings

from crt_lib import InputError
from crt_lib.audit.compare import resampled
from crt_lib.data import evaluation_windows
from crt_lib.exits.perloop import (
    above_full,
    changed_guesses,
    depth_sweep,
    exit_losses,
    frontier,
    logit_lens,
)
from crt_lib.exits.policy import CRITERIA, Policy
from crt_lib.exits.trace import apply_policy

SEQ_LEN = 32


def test_intervals_of_a_weighted_mean():
    rng = np.random.default_rng(1)
    weights = rng.integers(5, 50, 400)
    sums = np.stack([weights * 2.0, rng.normal(3, 1, 400) * weights], axis=1)
    exact, noisy = resampled(sums, weights)
    assert (exact.low, exact.mean, exact.high) == pytest.approx((2, 2, 2))
    assert noisy.low < 3 < noisy.high and noisy.low < noisy.mean < noisy.high
    error = np.sqrt((weights**2).sum()) / weights.sum()  # of a weighted mean of unit variance
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_exit_losses_are_the_means_of_the_trace(scored):
    *_, trace = scored
    rows = exit_losses(trace)
    assert [row["exit"] for row in rows] == list(trace.loops)
    for i, row in enumerate(rows):
        assert row["loss"].mean == pytest.approx(trace.loss[:, i].mean(dtype=np.float64), **SAME)
        assert row["loss"].low <= row["loss"].mean <= row["loss"].high
        assert row["right"] == trace.right[:, i].mean()
    assert rows[0]["takes_off"] is None
    for before, row in itertools.pairwise(rows):
        step = before["loss"].mean - row["loss"].mean
        largest = float(trace.loss.max())  # a step is a difference of losses in float32
        assert row["takes_off"].mean == pytest.approx(step, abs=largest * roundings(1))


def test_loss_above_full_depth(scored):
    *_, trace = scored
    full, early = (apply_policy(trace, policy) for policy in (Policy(), Policy(fixed=1)))
    assert above_full(trace, full.losses(trace)).high == 0
    above = early.loss - full.loss  # of each token a difference of losses in float32
    largest = float(trace.loss.max())
    assert above_full(trace, early.losses(trace)).mean == pytest.approx(
        above, abs=largest * roundings(1)
    )


def test_changed_guesses_by_hand(scored):
    model, data, trace = scored
    ids = data.valid.ids[: len(trace.loss)]
    guesses = {loop: [] for loop in trace.loops}
    for batch in evaluation_windows(ids, SEQ_LEN, 8, data.tokenizer.eot_id):
        with torch.inference_mode():
            logits = model(batch.inputs)
        for loop, values in logits.items():
            guesses[loop] += values.argmax(-1)[batch.targets >= 0].tolist()
    guesses = {loop: np.array(values) for loop, values in guesses.items()}
    for row, before in zip(changed_guesses(trace), trace.loops, strict=False):
        a, b = guesses[before], guesses[row["exit"]]
        assert row["changed"] == (a != b).mean()
        assert row["to right"] == ((a != ids) & (b == ids)).mean()
        assert row["from right"] == ((a == ids) & (b != ids)).mean()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_frontier_is_of_policies(scored, criterion):
    *_, trace = scored
    rows = frontier(trace, criterion, points=9)
    taus = [row["tau"] for row in rows]
    assert taus == sorted(set(taus)) and len(rows) >= 1
    row = rows[len(rows) // 2]
    outcome = apply_policy(trace, Policy(criterion, row["tau"], row["tau"], 1.0))
    assert (row["loss"], row["multiply_adds"]) == (outcome.loss, outcome.multiply_adds)
    loops = [row["mean_loops"] for row in rows]
    assert loops == sorted(loops)


def test_a_frontier_of_what_is_not_a_criterion(scored):
    with pytest.raises(InputError, match="the trace has no best; it has confidence"):
        frontier(scored[2], "best")


def test_the_depth_sweep_passes_through_the_exits_and_goes_on(scored):
    model, data, trace = scored
    ids = data.valid.ids[: len(trace.loss)]
    rows = depth_sweep(model, ids, data.tokenizer.eot_id, seq_len=SEQ_LEN, n_loops=6)
    assert [row["loops"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for i, loop in enumerate(trace.loops):
        assert rows[loop - 1]["trained"]
        stored = trace.loss[:, i].mean(dtype=np.float64)  # each rounded to float32
        assert rows[loop - 1]["loss"] == pytest.approx(stored, rel=roundings(1))
    cosines = trace.scores["similarity"].mean(0, dtype=np.float64)
    assert rows[1]["cosine"] == pytest.approx(cosines[1], rel=roundings(1))
    assert rows[0]["cosine"] is None and all(row["kl"] >= 0 for row in rows[1:])
    assert not rows[5]["trained"] and rows[5]["head"] == model.config.n_loops
    assert rows[5]["loss"] != rows[3]["loss"]


def test_the_lens_says_what_the_exits_say(scored):
    model, data, _ = scored
    text = "the cat sat on"
    seen = logit_lens(model, data.tokenizer, text)
    ids = data.tokenizer.encode(text)
    assert "".join(seen.tokens[1:]) == text and len(seen.tokens) == len(ids) + 1
    row = torch.tensor([[data.tokenizer.eot_id, *ids]])
    with torch.inference_mode():
        logits = model(row)
    for loop, values in logits.items():
        best = values[0].softmax(-1).max(-1)
        expected = [data.tokenizer.decode([i]) for i in best.indices.tolist()]
        assert seen.guesses[loop - 1] == expected
        assert seen.probabilities[loop - 1] == pytest.approx(best.values.numpy(), **SAME)
    assert np.isnan(seen.losses[:, -1]).all() and (seen.losses[:, :-1] > 0).all()
