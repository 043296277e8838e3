"""The fast step against the model it is made from: logits, exits and what the memory holds."""

import pytest
import torch
from closeness import as_accurate, near, roundings, same
from hypothesis import given, settings, strategies as st
from tiny_models import (
    ALL_OPTIONS,
    CAUSAL,
    OPTIONS,
    TINY,
    Pattern,
    exact_model,
    random_ids,
    random_model,
)
from torch import nn

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import FinelyQuantized, Layout, Product, Quantized
from crt_lib.cached.step import Step
from crt_lib.exits.gate import Gate
from crt_lib.exits.policy import Policy, leave, run_with_exits

KNOWN = 6  # tokens that the model itself has read
NEW = 7
FEW = {"paper": {}, **OPTIONS, "all options": ALL_OPTIONS}
ROWS = st.sampled_from([1, 2, 5])
POLICIES = (
    Policy(),
    Policy(fixed=1),
    Policy("confidence", tau0=0.1, tau_min=0.0),
    Policy("similarity", tau0=0.87, tau_min=0.87),
    Policy("similarity", tau0=0.87, tau_min=0.87, fixed=3),
    Policy("gate", tau0=0.6, tau_min=0.6),
    Policy("agreement", exits=(3,)),
    Policy("stability", tau0=0.97, tau_min=0.97),
)


def two_ways(model, ids, policies, starts=None):
    """Logits and exits of `NEW` tokens by the model and by a step, and the memory afterwards.

    The last token has full depth, so that every loop holds all tokens.
    """
    ways = []
    for fast in (False, True):
        memory = Memory(model.config, len(ids), ids.shape[1], model.loop_encoding, starts)
        run_with_exits(model, ids[:, :KNOWN], policies[0], memory)
        step = Step(model, memory)
        logits, loops = [], []
        for at, policy in enumerate([*policies[1:NEW], Policy()], KNOWN):
            if fast:
                exited = leave(step, ids[:, at], policy)
            else:
                exited = run_with_exits(model, ids[:, at : at + 1], policy, memory)
            logits.append(exited.logits.view(len(ids), -1))
            loops.append(exited.loops.flatten().tolist())
        ways.append((torch.stack(logits), loops, (memory.kv, memory.inputs)))
    return ways


def agree(slow, fast):
    """In float64: logits and memory the same, and exits equal."""
    assert fast[1] == slow[1]
    same((fast[0], *fast[2]), (slow[0], *slow[2]))


@settings(max_examples=80)
@given(data=st.data(), case=st.sampled_from(list(CAUSAL)), rows=ROWS)
def test_any_exits_of_any_rows(data, case, rows):
    """A policy for the known tokens and one for each new token: random exits of each row."""
    model = exact_model(**CAUSAL[case])
    exits = st.sampled_from(model.config.head_loops)
    drawn = [
        data.draw(st.lists(exits, min_size=rows * n, max_size=rows * n))
        for n in (KNOWN, *[1] * NEW)
    ]
    policies = [Pattern(torch.tensor(loops)) for loops in drawn]
    agree(*two_ways(model, random_ids(rows, KNOWN + NEW), policies))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_every_option(changes, rows):
    model = exact_model(**changes)
    agree(*two_ways(model, random_ids(rows, KNOWN + NEW), [Policy()] * (NEW + 1)))


@pytest.mark.parametrize("changes", [{}, ALL_OPTIONS], ids=["paper", "all options"])
@settings(max_examples=30)
@given(policies=st.lists(st.sampled_from(POLICIES), min_size=NEW + 1, max_size=NEW + 1), rows=ROWS)
def test_one_policy_after_another(changes, policies, rows):
    """Loops that were not run for a token are made up for when a later one runs them."""
    model = exact_model(**changes)
    weights = torch.randn(2, TINY.d_model + 1, generator=torch.Generator().manual_seed(2))
    model.gate = Gate(dict(zip((1, 3), 0.2 * weights, strict=True)))
    agree(*two_ways(model, random_ids(rows, KNOWN + NEW), policies))


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_padding_on_the_left(changes):
    model, ids = exact_model(**changes), random_ids(3, KNOWN + NEW)
    starts = torch.tensor([0, KNOWN - 1, 2])
    policies = [POLICIES[i % 4] for i in range(NEW + 1)]
    agree(*two_ways(model, ids, policies, starts))
    agree(*two_ways(model, ids[1:2], policies, starts[1:2]))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", FEW.values(), ids=FEW)
def test_in_the_precision_of_decoding(changes, dtype, rows):
    """Rounding: the step is about as near to float64 as the model is."""
    ids, policies = random_ids(rows, KNOWN + NEW), [Policy()] * (NEW + 1)
    rounded = random_model(**changes).to(dtype)
    exact, _ = two_ways(rounded.double(), ids, policies)
    slow, fast = two_ways(rounded.to(dtype), ids, policies)
    as_accurate(fast[0], slow[0], exact[0])


@settings(max_examples=60)
@given(data=st.data(), case=st.sampled_from(list(CAUSAL)), known=st.integers(0, KNOWN))
def test_several_tokens_of_a_row_at_once(data, case, known):
    """Read in one go up to an exit, or begun token by token and then caught up with."""
    model = exact_model(**CAUSAL[case])
    final, exits = model.config.n_loops, st.sampled_from(model.config.head_loops)
    runs = data.draw(st.lists(st.tuples(st.integers(1, 4), st.booleans(), exits), max_size=3))
    ids = random_ids(1, known + sum(n for n, *_ in runs) + 1)
    memory, other = (Memory(model.config, 1, ids.shape[1], model.loop_encoding) for _ in range(2))
    if known:
        run_with_exits(model, ids[:, :known], Policy(), memory)
    step, at, logits, left = Step(model, memory), known, [], [final] * known
    for n, at_once, loop in runs:
        own, at, last = ids[0, at : at + n], at + n, loop if at_once else final
        if at_once:
            z = step.read(own, last)
        else:
            pairs = [begun(step, token[None], loop) for token in own]
            z = step.catch_up(loop, *map(torch.cat, zip(*pairs, strict=True)))
        features, vocabulary = step.readout(last, z)
        logits.append(vocabulary(features))
        left += [last] * n
    logits.append(leave(step, ids[:, at], Policy()).logits)
    whole = run_with_exits(model, ids, Pattern(torch.tensor([*left, final])), other)
    same(torch.cat(logits), whole.logits[0, known:])
    same((memory.kv, memory.inputs), (other.kv, other.inputs))


def begun(step, token, loop):
    """The state after `loop` and the embedding, deeper loops yet to be run."""
    z = step.begin(token)
    for number in range(1, loop + 1):
        z = step.loop(number, z)
    step.end(loop, settle=False)
    return z, step.embedded


def test_a_memory_that_grows_and_changes_its_rows():
    model, ids = exact_model(**ALL_OPTIONS), random_ids(3, 12)
    rows = torch.tensor([2, 0, 0])
    memory = Memory(model.config, 3, 7, model.loop_encoding)
    run_with_exits(model, ids[:, :6], Policy(), memory)
    step = Step(model, memory)
    leave(step, ids[:, 6], Policy())
    memory.reserve(12)
    memory.select(rows)
    logits = [leave(step, ids[rows, at], Policy()).logits for at in range(7, 12)]
    memory.truncate(7)
    again = [leave(step, ids[rows, at], Policy()).logits for at in range(7, 12)]
    whole = run_with_exits(model, ids[rows], Policy()).logits[:, 7:]
    for made in (logits, again):
        same(torch.stack(made, 1), whole)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_32_bits(rows, bias):
    layer = nn.Linear(24, 36, bias=bias)
    with torch.no_grad():
        x, h = torch.randn(rows, 24), torch.randn(rows, 36)
        made = Layout(rows).layer(layer)
        assert made.weight.is_contiguous()
        for found, wanted in ((made(x), layer(x)), (made.add(h, x), h + layer(x))):
            near(found, wanted, 2 * 24)  # sums of 24 terms, some larger than what they sum to


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_8_bits(rows, bias):
    """Each number is off by at most half a step of its scale, weights of 127 steps, x of 127."""
    layer = nn.Linear(64, 1 << 14, bias=bias)
    with torch.no_grad():
        x = torch.randn(rows, 64)
        made, fine = (Layout(rows, "int8").layer(layer, vocabulary) for vocabulary in (False, True))
        assert type(made) is Quantized and type(fine) is FinelyQuantized
        step_w, a_weight = layer.weight.abs().amax(1) / 127, layer.weight.abs().sum(1)
        of_weights = step_w * x.abs().sum(1, keepdim=True) / 2
        step_x = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 127
        finer = x.abs().amax(1, keepdim=True) / 63 / 126
        for product, step in ((made, step_x), (fine, finer)):
            bound = of_weights + step * (a_weight + 64 * step_w) / 2
            for _ in range(2):  # its buffers are used again
                off = (product(x) - layer(x)).abs() - bound
                assert off.max() <= roundings(64) * layer(x).abs().max()
        assert type(Layout(rows, "int8").layer(nn.Linear(8, 8))) is Product


def test_a_step_leaves_the_weights_alone():
    model = random_model(**ALL_OPTIONS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = Step(model, Memory(model.config, 1, 8, model.loop_encoding))
    leave(step, torch.tensor([3]), Policy("confidence"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
