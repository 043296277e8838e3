"""Traces: a policy on a trace is the policy on the model, and says what it costs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from closeness import SAME, roundings
from hypothesis import given, strategies as st
from safetensors import SafetensorError

from crt_lib import InputError, evaluate
from crt_lib.audit.accounting import multiply_adds
from crt_lib.cached.step import Window
from crt_lib.data import evaluation_windows
from crt_lib.exits.policy import CRITERIA, Loop, Policy, run_with_exits
from crt_lib.exits.trace import Trace, apply_policy, calibrate, chance, oracle

SEQ_LEN = 32


def run_policy(model, data, policy, max_tokens):
    """Nats and exit loop by token: a full pass of the model, then exits by its own scores."""
    nats, loops = [], []
    ids = data.valid.ids[:max_tokens]
    for batch in evaluation_windows(ids, SEQ_LEN, 8, data.tokenizer.eot_id):
        for row, target in zip(batch.inputs, batch.targets, strict=True):
            exits, before = {}, None
            z_before, embedded = model.begin(row[None])
            for number in range(1, model.config.n_loops + 1):
                z = model.apply_loop(number, z_before, embedded)
                if number in model.config.head_loops:
                    before = exits[number] = Loop(Window(model), number, z, z_before, before)
                z_before = z
            last = model.config.n_loops
            score = CRITERIA[policy.criterion].score
            passes = {
                k: score(loop)[0] >= policy.threshold(k) for k, loop in exits.items() if k < last
            }
            for t, token in enumerate(target):
                number = next((k for k in passes if passes[k][t]), last)
                nats.append(-exits[number].logits[0, t].log_softmax(-1)[token].item())
                loops.append(number)
    return np.array(nats), np.array(loops)


def clear_of(trace, policy):
    """Which tokens have no score as near to its threshold as rounding to float32 brings them.

    The text repeats itself, and so do the scores. Agreement is 0 or 1 in any precision.
    """
    if policy.criterion == "agreement":
        return np.ones(len(trace.loss), dtype=bool)
    asked = enumerate(trace.loops[:-1])
    near = [trace.scores[policy.criterion][:, i] - policy.threshold(loop) for i, loop in asked]
    return (np.abs(near) > 1e-6).all(0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_shares(scored, criterion):
    scores = scored[-1].scores[criterion]
    assert np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1 + 1e-6


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.inference_mode()
def test_a_policy_on_the_trace_is_the_policy_on_the_model(scored, criterion):
    model, data, trace = scored
    tau = float(np.quantile(trace.scores[criterion], 0.6))
    policy = Policy(criterion, tau0=tau, tau_min=0.9 * tau)
    outcome = apply_policy(trace, policy)
    nats, loops = run_policy(model, data, policy, 500)
    clear = clear_of(trace, policy)
    assert clear.mean() > 0.9
    assert (np.array(trace.loops)[outcome.exit] == loops)[clear].all()
    chosen = np.take_along_axis(trace.loss, outcome.exit[:, None], 1)[:, 0]  # float32
    assert chosen[clear] == pytest.approx(nats[clear], rel=roundings(1))
    assert 1 < outcome.mean_loops < model.config.n_loops


def test_full_depth_is_the_evaluation(scored):
    model, data, trace = scored
    whole = evaluate(model, data.valid, data.tokenizer.eot_id, seq_len=SEQ_LEN, max_tokens=500)
    for i, loop in enumerate(trace.loops):
        outcome = apply_policy(trace, Policy(fixed=loop))
        assert outcome.loss == pytest.approx(trace.loss[:, i].mean(dtype=np.float64), **SAME)
        assert outcome.loss == pytest.approx(whole.loss[loop], rel=roundings(1))
        cost = sum(multiply_adds(model.config, SEQ_LEN, (loop,)).values())
        assert (outcome.mean_loops, outcome.multiply_adds) == (loop, cost)
    assert apply_policy(trace, Policy()).loss == apply_policy(trace, Policy(fixed=loop)).loss


def test_heads_that_are_asked_are_counted(scored):
    _, _, trace = scored
    last = len(trace.loops)
    never = {"tau0": 1.0, "tau_min": 1.0, "decay": 1.0}
    full = apply_policy(trace, Policy()).multiply_adds
    head = trace.costs[1]
    asked = apply_policy(trace, Policy("confidence", **never)).multiply_adds
    assert asked == full + (last - 1) * head
    assert apply_policy(trace, Policy("similarity", **never)).multiply_adds <= full
    always = {"tau0": 0.0, "tau_min": 0.0}
    first = apply_policy(trace, Policy(fixed=trace.loops[0])).multiply_adds
    for criterion in ("confidence", "similarity"):
        assert apply_policy(trace, Policy(criterion, **always)).multiply_adds == first


def test_no_policy_beats_the_oracle(scored):
    _, _, trace = scored
    bound = oracle(trace)
    right = np.take_along_axis(trace.right, bound.exit[:, None], 1).mean()
    for loop in trace.loops:
        exit_of = apply_policy(trace, Policy(fixed=loop)).exit
        assert right >= np.take_along_axis(trace.right, exit_of[:, None], 1).mean()
    assert math.isclose(sum(bound.shares), 1.0)


@pytest.mark.parametrize("criterion", ["confidence", "similarity", "agreement"])
@pytest.mark.parametrize("allowed", [0.0, 0.005, 0.5])
def test_a_calibrated_threshold_keeps_the_promise(scored, criterion, allowed):
    _, _, trace = scored
    outcome = apply_policy(trace, calibrate(trace, criterion, allowed))
    full = apply_policy(trace, Policy())
    assert outcome.token_ppl <= full.token_ppl * (1 + allowed) * (1 + 1e-9)
    assert outcome.multiply_adds <= full.multiply_adds


def test_chance_keeps_the_promise_between_two_exits(scored):
    _, _, trace = scored
    full = apply_policy(trace, Policy())
    for allowed in (0.0, 0.005, 0.5):
        drawn = chance(trace, trace, allowed)
        slack = 3 * trace.loss.std() / len(trace.loss) ** 0.5
        assert drawn.loss <= full.loss + math.log1p(allowed) + slack
        assert drawn.multiply_adds <= full.multiply_adds and drawn.heads == 1
        assert sum(share > 0 for share in drawn.shares) <= 2


def test_a_criterion_that_the_trace_has_not(scored):
    _, _, trace = scored
    scores = {name: values for name, values in trace.scores.items() if name != "gate"}
    poorer = dataclasses.replace(trace, scores=scores)
    for ask in (
        lambda: apply_policy(poorer, Policy("gate")),
        lambda: calibrate(poorer, "gate", 0.1),
    ):
        with pytest.raises(InputError, match="the trace has no gate; it has confidence"):
            ask()


@pytest.mark.parametrize("criterion", ["agreement", "stability", "confidence", "similarity"])
@pytest.mark.parametrize("exits", [(2,), (3,), (1, 3)])
def test_exits_that_are_left_out_are_still_compared_with(scored, criterion, exits):
    """A first window, whose context has run all loops on both sides."""
    model, data, trace = scored
    taus = np.quantile(trace.scores[criterion][:, 1:], (0.5, 0.45, 0.55)).tolist()
    policies = (Policy(criterion, tau, tau, 1.0, exits) for tau in taus)
    policy = next(policy for policy in policies if clear_of(trace, policy)[0])
    outcome = apply_policy(trace, policy)
    (first, *_) = evaluation_windows(data.valid.ids[:SEQ_LEN], SEQ_LEN, 1, data.tokenizer.eot_id)
    loops = run_with_exits(model, first.inputs[:, :1], policy).loops[0]
    assert trace.loops[outcome.exit[0]] == loops[0]
    assert 0 < (outcome.exit < 3).mean() < 1
    compares = criterion in ("agreement", "stability")
    extra = sum(loop - 1 not in exits and loop > 1 for loop in exits) if compares else 0
    asks = 0 if criterion == "similarity" else 1
    never = apply_policy(trace, Policy(criterion, 1.0, 1.0, 1.0, exits))
    if criterion != "agreement":  # a score may round to 1
        assert never.heads == pytest.approx(1 + asks * len(exits) + extra, abs=0.1)


@given(low=st.floats(0, 1), high=st.floats(0, 1), criterion=st.sampled_from(list(CRITERIA)))
def test_a_higher_threshold_never_leaves_earlier(scored, low, high, criterion):
    _, _, trace = scored
    low, high = sorted((low, high))
    early, late = (
        apply_policy(trace, Policy(criterion, tau, tau, decay=1.0)) for tau in (low, high)
    )
    assert (early.exit <= late.exit).all()


def test_a_file_gives_the_trace_back(scored, tmp_path):
    _, _, trace = scored
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    policy = Policy("margin", 0.3, 0.1)
    ours, theirs = apply_policy(trace, policy), apply_policy(again, policy)
    assert (ours.exit == theirs.exit).all() and ours.loss == theirs.loss
    for field in dataclasses.fields(trace):
        mine, other = getattr(trace, field.name), getattr(again, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype and (mine == other).all()
        elif field.name != "scores":
            assert mine == other
    assert list(again.scores) == list(trace.scores)  # in this order a page lists them
    for name, values in trace.scores.items():
        assert values.dtype == again.scores[name].dtype and (values == again.scores[name]).all()
    per_token = (tmp_path / "t.safetensors").stat().st_size / len(trace.loss)
    assert per_token * 50_000 < 4e6 + 2e5 * len(trace.scores)


def test_a_full_disk_is_one_line_and_leaves_nothing(scored, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("crt_lib.exits.scoring.save_file", full)
    with pytest.raises(InputError, match="Free some space"):
        scored[2].save(tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_trace(tmp_path, scored):
    (tmp_path / "t").write_bytes(b"{}")
    for path in (tmp_path / "t", tmp_path / "absent"):
        with pytest.raises(InputError, match="not a trace"):
            Trace.load(path)
    with pytest.raises(InputError, match="exit 9 is not in the trace"):
        apply_policy(scored[2], Policy("confidence", exits=(9,)))
    with pytest.raises(InputError, match="exit 9 is not in the trace"):
        apply_policy(scored[2], Policy(fixed=9))
    with pytest.raises(InputError, match="allowed loss is -1"):
        calibrate(scored[2], "confidence", -1)


def test_some_tokens_are_a_trace(scored):
    _, _, valid = scored
    tokens = len(valid.loss) // 2
    half = valid.some(slice(tokens, None))
    assert (
        len(half.loss) == len(half.document) == len(half.scores["gate"]) == len(valid.loss) - tokens
    )
    assert set(half.document) == set(range(half.document[-1] + 1))
    assert (np.diff(half.document) == np.diff(valid.document[tokens:]).clip(0, 1)).all()
    assert apply_policy(half, Policy()).loss == pytest.approx(valid.loss[tokens:, -1].mean())
