"""A packed trace: exact where it is promised, near elsewhere, and read back as it was."""

import base64

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import Trace, apply_policy, oracle
from crt_lib.show import packed
from crt_lib.show.packed import LEVELS, coarse, largest_errors, pack, some_tokens
from crt_lib.study.policies import policies_of

STORED = "results/small/crt2"


@st.composite
def scores(draw):
    """Up to 2,000 float32 scores in [0, 1], some of them many times."""
    seed, count = draw(st.integers(0, 2**31)), draw(st.integers(1, 2_000))
    rng = np.random.default_rng(seed)
    values = rng.random(draw(st.sampled_from([1, 2, 40, count])))
    return rng.choice(values ** draw(st.sampled_from([1, 30])), count).astype(np.float32)


@settings(max_examples=60)
@given(scores(), st.lists(st.floats(0, 1), max_size=5), st.floats(0, 1))
def test_levels_are_exact_at_the_thresholds_given_and_near_elsewhere(own, taus, other):
    kept = packed._to_levels(own, taus)
    assert len(np.unique(kept)) <= LEVELS and np.isin(kept, own).all()
    for tau in taus:
        assert ((kept >= np.float32(tau)) == (own >= np.float32(tau))).all()
    assert (np.diff(kept[np.argsort(own, kind="stable")]) >= 0).all()
    apart = (kept >= np.float32(other)) != (own >= np.float32(other))
    _, times = np.unique(own, return_counts=True)
    assert apart.sum() <= len(own) / (LEVELS - len(taus)) + times.max()


def test_policies_that_are_named_come_out_exactly(scored):
    trace = scored[2]
    exact = [Policy(name, 0.71, 0.6, 0.97) for name in trace.scores]
    kept = coarse(trace, exact)
    for policy in (*exact, *(Policy(fixed=loop) for loop in trace.loops)):
        ours, theirs = apply_policy(kept, policy), apply_policy(trace, policy)
        assert (ours.exit == theirs.exit).all()
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert (oracle(kept).exit == oracle(trace).exit).mean() > 0.99
    fixed = apply_policy(kept, Policy(fixed=2)).loss
    assert fixed == pytest.approx(apply_policy(trace, Policy(fixed=2)).loss, abs=1e-9)


def test_what_is_packed_is_read_back(scored):
    kept = coarse(scored[2])
    sent = pack(kept)

    def read(text, kind):
        return np.frombuffer(base64.b64decode(text), kind)

    for own, loss in zip(sent["loss"], kept.loss.T, strict=True):
        again = own["low"] + own["step"] * read(own["steps"], "<u2")
        assert again == pytest.approx(loss, abs=1e-9)
    for name, own in sent["scores"].items():
        for exit_, theirs in zip(own["exits"], kept.scores[name].T, strict=True):
            values, levels = read(exit_["values"], "<f4"), read(exit_["levels"], np.uint8)
            if len(values) == 2:
                levels = np.unpackbits(levels)[: len(theirs)]
            again = values[levels] if len(values) > 1 else np.repeat(values, len(theirs))
            assert (again == theirs).all()
    assert (read(sent["oracle"], np.uint8) == oracle(kept).exit).all()


def test_some_tokens_lose_at_every_exit_what_all_do(scored):
    trace = scored[2]
    some = some_tokens(trace, 77)
    assert len(some.loss) == len(some.document) == len(some.scores["gate"]) == 77
    assert set(some.document) == set(range(some.document.max() + 1))
    for loop in trace.loops:
        ours, theirs = (apply_policy(each, Policy(fixed=loop)).loss for each in (some, trace))
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert some_tokens(trace, len(trace.loss)) is trace


def test_the_stored_trace_is_packed_whole_with_small_errors():
    from crt_lib.files import read_rows
    from crt_lib.runs.manifest import checkout_root

    folder = checkout_root() / STORED
    trace = Trace.load(folder / "traces" / "test.safetensors")
    judged = policies_of(read_rows(folder / "policies.csv"))
    kept = coarse(trace, judged.values())
    errors = largest_errors(trace, kept)
    assert 0 < errors["ppl"] < 0.001 and 0 < errors["loops"] < 0.01
    for policy in judged.values():
        assert apply_policy(kept, policy).loss == pytest.approx(
            apply_policy(trace, policy).loss, abs=5e-8
        )
