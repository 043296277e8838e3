"""Batches: what is seen, how often, in which order, and what is scored."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from crt_lib.data import Batch, PackedWindows, PaddedLines, evaluation_lines, evaluation_windows
from crt_lib.files import InputError
from crt_lib.text.corpus import released_lines

EOT = 10**6  # stands nowhere else: the ids of a test are their positions


@st.composite
def packed(draw: st.DrawFn) -> PackedWindows:
    seq_len, batch_size = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    length = (batch_size + 1) * seq_len - 1 + draw(st.integers(0, 150))
    return PackedWindows(np.arange(length), seq_len, batch_size, draw(st.integers(0, 9)), EOT)


def ragged(lengths: list[int]) -> list[np.ndarray]:
    """Lines whose tokens say which line (hundreds) and position they are."""
    return [100 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths, 1)]


def same(one, other) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@given(packed(), st.integers(0, 5))
def test_packed_windows_of_an_epoch_share_no_target(windows: PackedWindows, epoch: int):
    targets, follows = Counter(), {}
    for step in range(windows.steps_per_epoch):
        batch = windows.batch(epoch, step)
        assert batch.inputs.shape == (windows.batch_size, windows.seq_len)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        targets.update(batch.targets.flatten().tolist())
        follows |= zip(
            batch.inputs.flatten().tolist(), batch.targets.flatten().tolist(), strict=True
        )
    assert max(targets.values()) == 1
    assert EOT not in targets
    assert all(target == (0 if token == EOT else token + 1) for token, target in follows.items())


@given(packed(), st.integers(0, 5), st.data())
def test_a_packed_batch_depends_on_seed_epoch_and_step_alone(windows, epoch, data):
    step = data.draw(st.integers(0, windows.steps_per_epoch - 1))
    wanted = windows.batch(epoch, step)
    fresh = PackedWindows(
        windows._stream[1:], windows.seq_len, windows.batch_size, windows.seed, EOT
    )
    fresh.batch(epoch + 1, 0)
    assert same(fresh.batch(epoch, step), wanted)


def test_epochs_and_seeds_differ_in_order_and_offset():
    def order(seed: int, epoch: int) -> list[int]:
        windows = PackedWindows(np.arange(1_000), 10, 5, seed, EOT)
        batches = [windows.batch(epoch, step) for step in range(windows.steps_per_epoch)]
        return torch.cat([batch.targets[:, 0] for batch in batches]).tolist()

    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert len({order(0, epoch)[0] % 10 for epoch in range(20)}) > 3


def test_over_the_epochs_every_token_is_a_target():
    windows, seen = PackedWindows(np.arange(103), 10, 2, 0, EOT), set()
    for epoch in range(40):
        for step in range(windows.steps_per_epoch):
            seen.update(windows.batch(epoch, step).targets.flatten().tolist())
    assert seen == set(range(103))


def test_a_corpus_too_small_for_one_batch_says_how_much_is_needed():
    with pytest.raises(InputError, match=r"38 tokens, too few .* 3 x 10; it needs 39"):
        PackedWindows(np.arange(38), 10, 3, 0, EOT)
    assert PackedWindows(np.arange(39), 10, 3, 0, EOT).steps_per_epoch == 1
    with pytest.raises(InputError, match="0 lines"):
        PaddedLines([], 10, 1, 0, EOT)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_epoch_is_refused(step: int):
    with pytest.raises(InputError, match=r"0\.\.2"):
        PaddedLines(ragged([3, 3, 3]), 5, 1, 0, EOT).batch(0, step)


@given(st.integers(0, 120), st.integers(1, 16), st.integers(1, 5), st.data())
def test_evaluation_scores_every_token_once(length, seq_len, batch_size, data):
    stride = data.draw(st.none() | st.integers(1, seq_len))
    scored = []
    for batch in evaluation_windows(np.arange(length), seq_len, batch_size, EOT, stride):
        rows, columns = batch.inputs.shape
        assert rows <= batch_size and columns <= seq_len
        for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            for position, (token, target) in enumerate(zip(tokens, targets, strict=True)):
                if target >= 0:
                    assert token == (target - 1 if target else EOT)
                    assert position == target or stride is None or position >= seq_len - stride
                    scored.append(target)
    assert sorted(scored) == list(range(length))


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_skip_tokens_is_refused(stride: int):
    with pytest.raises(InputError, match="from 1 to 8"):
        list(evaluation_windows(np.arange(20), 8, 2, EOT, stride))


@given(st.lists(st.integers(0, 14), min_size=1, max_size=20), st.integers(1, 8), st.integers(1, 3))
def test_padded_lines_hold_a_line_a_row(lengths, seq_len, batch_size):
    batch_size = min(batch_size, len(lengths))
    rows = PaddedLines(ragged(lengths), seq_len, batch_size, 3, EOT)
    expected = []
    for i, n in enumerate(lengths, 1):
        row = [100 * i + j if j < n else EOT for j in range(seq_len)]
        expected.append((row, [*row[1:], -100]))
    found = []
    for step in range(rows.steps_per_epoch):
        batch = rows.batch(7, step)
        assert same(batch, rows.batch(7, step)) and len(batch.inputs) == batch_size
        found += pairs(batch)
    left = list(expected)
    for row in found:
        left.remove(row)  # raises where a row is repeated or never existed
    assert len(left) == len(lengths) % batch_size
    real = sum(min(n, seq_len) for n in lengths)
    assert rows.padding_share == pytest.approx(1 - real / (len(lengths) * seq_len))

    every = evaluation_lines(ragged(lengths), seq_len, batch_size, EOT)
    assert [pair for batch in every for pair in pairs(batch)] == expected
    unscored = evaluation_lines(ragged(lengths), seq_len, batch_size, EOT, score_padding=False)
    assert [pair for batch in unscored for pair in pairs(batch)] == [
        (row, [-100 if token == EOT else token for token in target]) for row, target in expected
    ]


def pairs(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


def test_a_real_token_equal_to_the_padding_is_scored():
    (batch,) = evaluation_lines([np.array([5, EOT, 7])], 5, 1, EOT, score_padding=False)
    assert batch.targets.tolist() == [[EOT, 7, -100, -100, -100]]


def test_released_lines_count_the_line_end():
    assert released_lines("a" * 49 + "\n" + "b" * 50 + "\n\n" + "c" * 50) == ["b" * 50 + "\n"]
    assert released_lines("d" * 25 + "\u2028" + "d" * 25) == ["d" * 25 + "\u2028" + "d" * 25]
