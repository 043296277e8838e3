"""Exits: what a token that has left leaves behind, however the tokens are split over calls."""

import dataclasses
import itertools
import math

import pytest
import torch
from closeness import same
from hypothesis import given, strategies as st
from tiny_models import CAUSAL, Pattern, exact_model, random_ids

from crt_lib import InputError
from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Window
from crt_lib.exits.policy import CRITERIA, Loop, Policy, run_with_exits
from crt_lib.layers import Attention, DilatedConv

POLICIES = (
    Policy(),
    Policy(fixed=3),
    Policy("confidence", tau0=0.1, tau_min=0.0),
    Policy("similarity", tau0=0.87, tau_min=0.87),
    Policy("stability", tau0=0.97, tau_min=0.97),
)


def plainly(model, ids, loops):
    """Logits with exits, from a full forward pass whose mixing layers read what a token left."""
    left: dict = {}
    count: dict = {}
    staying = torch.ones_like(ids, dtype=torch.bool)

    def keep(module, args):
        count[module] = count.get(module, 0) + 1
        key = (module, count[module])
        x = torch.where(staying[..., None], args[0], left.get(key, args[0]))
        left[key] = x
        return (x, *args[1:])

    mixing = [m for m in model.block.modules() if isinstance(m, Attention | DilatedConv)]
    logits = torch.zeros(*ids.shape, model.config.vocab_size, dtype=torch.float64)
    z, embedded = model.begin(ids)
    hooks = [module.register_forward_pre_hook(keep) for module in mixing]
    try:
        for loop in range(1, model.config.n_loops + 1):
            count.clear()
            z = torch.where(staying[..., None], model.apply_loop(loop, z, embedded), z)
            here = loops == loop
            if here.any():
                features, weight = model.readout(loop, z)
                logits[here] = (features @ weight.T)[here]
            staying &= ~here
    finally:
        for hook in hooks:
            hook.remove()
    return logits


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_a_token_that_left_keeps_what_it_had(changes):
    model, ids = exact_model(**changes), random_ids(2, 14)
    choices = torch.tensor(model.config.head_loops)
    pick = torch.randint(len(choices), ids.shape, generator=torch.Generator().manual_seed(3))
    loops = choices[pick]
    exited = run_with_exits(model, ids, Pattern(loops))
    same(exited.logits, plainly(model, ids, loops))
    assert torch.equal(exited.loops, loops)


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_without_exits_it_is_the_model(changes):
    model, ids = exact_model(**changes), random_ids(2, 14)
    full = model(ids)
    for loop in model.config.head_loops:
        exited = run_with_exits(model, ids, Policy(fixed=loop))
        same(exited.logits, full[loop])


@given(
    case=st.sampled_from(list(CAUSAL)),
    policy=st.sampled_from(POLICIES),
    cuts=st.lists(st.integers(1, 15), max_size=6),
)
def test_any_split_gives_the_same_logits(case, policy, cuts):
    model, ids = exact_model(**CAUSAL[case]), random_ids(2, 16)
    whole = run_with_exits(model, ids, policy)
    memory = Memory(model.config, 2, 16, model.loop_encoding)
    edges = sorted({0, 16, *cuts})
    parts = [
        run_with_exits(model, ids[:, a:b], policy, memory) for a, b in itertools.pairwise(edges)
    ]
    logits = torch.cat([part.logits for part in parts], 1)
    same(logits, whole.logits)
    assert torch.equal(torch.cat([part.loops for part in parts], 1), whole.loops)


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_padding_on_the_left_changes_nothing(changes):
    model, ids = exact_model(**changes), random_ids(3, 12)
    lengths = [12, 5, 9]
    padded = torch.zeros_like(ids)
    for row, own, length in zip(padded, ids, lengths, strict=True):
        row[12 - length :] = own[:length]
    policy = POLICIES[2]
    memory = Memory(model.config, 3, 12, model.loop_encoding, 12 - torch.tensor(lengths))
    together = run_with_exits(model, padded, policy, memory, last=True)
    for i, length in enumerate(lengths):
        alone = run_with_exits(model, ids[i : i + 1, :length], policy)
        same(together.logits[i, -1], alone.logits[0, -1])
        assert together.loops[i, -1] == alone.loops[0, -1]


def test_some_tokens_leave_and_some_stay():
    model, ids = exact_model(), random_ids(2, 30)
    for policy in POLICIES[2:]:
        loops = run_with_exits(model, ids, policy).loops
        assert len(loops.unique()) > 1


def test_the_criteria_by_hand():
    model, ids = exact_model(), random_ids(2, 9)
    previous, z_before = None, None
    for number, z in model.hidden_states(ids, 3):
        if number in model.config.head_loops:
            loop = Loop(Window(model), number, z, z_before if z_before is not None else z, previous)
            p = model(ids)[number].softmax(-1)
            first, second = p.sort(-1, descending=True).values[..., :2].unbind(-1)
            entropy = -(p * p.log()).sum(-1)
            expected = {
                "confidence": first,
                "margin": first - second,
                "certainty": 1 - entropy / math.log(37),
            }
            if previous is not None:
                q = model(ids)[previous.number].softmax(-1)
                expected["stability"] = torch.exp(-(p * (p / q).log()).sum(-1))
                expected["agreement"] = (p.argmax(-1) == q.argmax(-1)).double()
                cosine = (z * z_before).sum(-1) / z.norm(dim=-1) / z_before.norm(dim=-1)
                expected["similarity"] = cosine.clamp(min=0)
            for name, values in expected.items():
                same(CRITERIA[name].score(loop).double(), values)
            previous = loop
        z_before = z


def test_a_fixed_exit_ends_a_criterion():
    model, ids = exact_model(), random_ids(2, 20)
    policy = Policy("similarity", tau0=0.87, tau_min=0.87)
    free, capped = (
        run_with_exits(model, ids, dataclasses.replace(policy, fixed=last)) for last in (None, 3)
    )
    assert torch.equal(capped.loops, free.loops.clamp(max=3))
    assert len(capped.loops.unique()) > 1


def test_the_decaying_threshold_of_the_paper():
    paper = Policy("confidence")
    assert [round(paper.threshold(loop), 4) for loop in (1, 2, 7, 8)] == [0.92, 0.9016, 0.815, 0.8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "patience"}, "'patience' is not one of confidence"),
        ({"tau0": 1.2}, "tau0 is 1.2"),
        ({"tau_min": -0.1}, "tau_min is -0.1"),
        ({"tau0": 0.5, "tau_min": 0.6}, "only falls"),
    ],
)
def test_policies_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        Policy(**{"criterion": "confidence", **changes})


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({}, Policy("gate"), "no trained exit gate"),
        ({"causal": False}, Policy(), "sees the future"),
        ({}, Policy(fixed=2), r"loop 2 has no head.*\(1, 3, 4\)"),
        ({}, Policy("margin", exits=(1, 2)), r"loop 2 has no head.*\(1, 3, 4\)"),
    ],
)
def test_what_cannot_run(changes, policy, message):
    with pytest.raises(InputError, match=message):
        run_with_exits(exact_model(**changes), random_ids(1, 4), policy)
