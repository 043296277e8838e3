"""What an update draws and steps: its exits, its depth, its optimizers."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from closeness import same
from tiny_models import ALL_OPTIONS, SHARINGS, TINY, VARIANTS, random_ids, random_model

from crt_lib.config import TrainConfig
from crt_lib.files import InputError
from crt_lib.loss import total_loss
from crt_lib.model import CRT
from crt_lib.optim import Muon, exits_of_update, make_optimizers

LOOPS = (2, 4, 6, 8)
DRAWS = 3000


def drawn(head_loops: tuple[int, ...] = LOOPS, **changes) -> list[tuple[int, ...]]:
    """The exits of the first updates."""
    config = TrainConfig(**changes)
    return [exits_of_update(head_loops, update, config) for update in range(DRAWS)]


def assert_frequency(count: int, probability: float) -> None:
    """`count` of the draws is within 5 standard deviations of what `probability` has it."""
    deviation = math.sqrt(DRAWS * probability * (1 - probability))
    assert abs(count - DRAWS * probability) <= 5 * deviation


@pytest.mark.parametrize("sampling", ["none", "uniform", "poisson"])
@pytest.mark.parametrize("trained", ["all", "one"])
@pytest.mark.parametrize(
    "head_loops", [LOOPS, (1, 2, 3, 4, 5, 6, 7, 8), (3, 8), (1, 2), (4,), (1,)]
)
def test_exits_are_deterministic_and_increasing(head_loops, trained, sampling):
    options = {"loop_sampling": sampling, "exits_trained": trained}
    exits = drawn(head_loops, **options)
    assert exits == drawn(head_loops, **options)
    for loops in exits:
        assert loops and set(loops) <= set(head_loops)
        assert list(loops) == sorted(set(loops))
        if trained == "all":
            assert loops == head_loops[: len(loops)]
        elif len(loops) > 1:
            assert len(loops) == 2
        if sampling == "none":
            assert loops[-1] == head_loops[-1]


@pytest.mark.parametrize("options", [{"exits_trained": "one"}, {"loop_sampling": "uniform"}])
def test_another_seed_draws_other_exits(options):
    assert drawn(**options, seed=1) != drawn(**options, seed=2)


def test_one_exit_is_drawn_uniformly_and_all_by_default():
    assert set(drawn()) == {LOOPS}
    counts = Counter(drawn(exits_trained="one"))
    assert set(counts) == {(2, 8), (4, 8), (6, 8)}
    for count in counts.values():
        assert_frequency(count, 1 / 3)


def test_one_exit_has_the_expectation_of_all():
    values = torch.tensor([4.0, 2.5, 1.25, 1.0], dtype=torch.float64)
    losses = dict(zip(LOOPS, values, strict=True))
    every = set(drawn(exits_trained="one"))
    totals = [total_loss({loop: losses[loop] for loop in exits}, 0.3) for exits in every]
    same(torch.stack(totals).mean(), total_loss(losses, 0.3))


def test_uniform_depth_reaches_every_head_as_often_as_its_loops():
    head_loops = (1, 4, 6, 8)
    counts = Counter(exits[-1] for exits in drawn(head_loops, loop_sampling="uniform"))
    assert set(counts) == set(head_loops)
    for before, loop in itertools.pairwise((0, *head_loops)):
        assert_frequency(counts[loop], (loop - before) / 8)


def test_poisson_depth_is_mostly_the_deepest():
    counts = Counter(exits[-1] for exits in drawn(loop_sampling="poisson"))
    assert set(counts) == set(LOOPS)
    assert counts[8] > DRAWS / 2
    assert counts[8] > counts[6] > counts[4] > counts[2]


def test_one_exit_of_a_sampled_depth():
    exits = set(drawn(loop_sampling="uniform", exits_trained="one"))
    assert exits == {(2,), (2, 4), (2, 6), (4, 6), (2, 8), (4, 8), (6, 8)}


MUON_CASES = {
    **{trm: {"trm": trm} for trm in VARIANTS},
    **{sharing: {"head_sharing": sharing} for sharing in SHARINGS},
    "all options": ALL_OPTIONS,
    "narrow, batch norm": {"embed_dim": 6, "norm": "batch", "injection": True, "n_prelude": 2},
}


@pytest.mark.parametrize("changes", MUON_CASES.values(), ids=MUON_CASES)
def test_muon_takes_the_matrices_inside_the_model(changes):
    model = CRT(TINY.replace(**changes))
    adamw, muon = make_optimizers(model, TrainConfig(optimizer="muon"))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, Muon)
    names = {id(value): name for name, value in model.named_parameters()}
    held = [
        {names[id(value)] for group in optimizer.param_groups for value in group["params"]}
        for optimizer in (adamw, muon)
    ]
    assert not held[0] & held[1] and held[0] | held[1] == set(names.values())
    inner = re.compile(r"\.(qkv|out|up|down|pointwise|proj)\.weight$")
    assert held[1] == {
        name
        for name, value in model.named_parameters()
        if inner.search(name) or (name.startswith("heads.") and len(value) != TINY.vocab_size)
    }


def test_adamw_takes_everything():
    model = CRT(TINY)
    (adamw,) = make_optimizers(model, TrainConfig())
    held = [id(value) for group in adamw.param_groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_moves_every_parameter(kind):
    model = random_model(**ALL_OPTIONS)
    before = {name: value.clone() for name, value in model.named_parameters()}
    sum(model(random_ids(2, 13), targets=random_ids(2, 13, seed=2)).values()).backward()
    for optimizer in make_optimizers(model, TrainConfig(optimizer=kind)):
        optimizer.step()
    for name, value in model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


@pytest.mark.parametrize("head_loops", [(1, 2, 3, 4), (2, 4), (4,)])
@pytest.mark.parametrize("starts", [(0.35,), (0.2, 0.4, 0.6), (0.0, 0.5)])
def test_loops_that_begin_late_are_trained_from_their_share_on(head_loops, starts):
    config = TrainConfig(loop_starts=starts)
    for percent in range(100):
        begun = 1 + sum(percent / 100 >= share for share in starts)
        loops = begun if begun <= len(starts) else head_loops[-1]
        exits = exits_of_update(head_loops, 0, config, percent / 100)
        assert exits == head_loops[: len(exits)]
        assert exits[-1] >= min(loops, head_loops[-1])
        assert len(exits) == 1 or exits[-2] < loops


@pytest.mark.parametrize("starts", [(0.5, 0.2), (-0.1,), (1.0,)])
def test_starts_that_do_not_rise_within_the_training_are_refused(starts):
    with pytest.raises(InputError, match="loop_starts"):
        TrainConfig(loop_starts=starts)


def test_a_stored_setting_that_is_gone_and_did_nothing_is_no_matter():
    stored = TrainConfig().to_dict() | {"exits_start": 0.0}
    assert TrainConfig.from_dict(stored) == TrainConfig()
    with pytest.raises(InputError, match="exits_start"):
        TrainConfig.from_dict(stored | {"exits_start": 0.5})
