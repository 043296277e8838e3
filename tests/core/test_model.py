"""The fast model against the plain reference, its counts, its causality and its bad input."""

import itertools
import math

import pytest
import torch
from closeness import as_accurate, same
from hypothesis import given, settings, strategies as st
from tiny_models import (
    ALL_OPTIONS,
    COMBINATIONS,
    DROPOUTS,
    GRADIENT_CASES,
    NORMS,
    OPTIONS,
    SHAPES,
    SHARINGS,
    TINY,
    VARIANTS,
    exact_model,
    exits_that_see_later_tokens,
    random_ids,
    random_model,
)

from crt_lib import loss
from crt_lib.audit.reference import reference_logits, reference_loss
from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.loss import total_loss
from crt_lib.model import CRT


def check_logits(model: CRT) -> None:
    """In float64, where rounding cannot hide a wrong formula; then float32 errs as a plain one."""
    ids, found, expected = random_ids(2, 13), {}, {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            expected[dtype] = reference_logits(model.state_dict(), model.config, ids)
            found[dtype] = model(ids)
    exact = expected[torch.float64]
    same(found[torch.float64], exact)
    as_accurate(found[torch.float32], expected[torch.float32], exact)


def reference_gradients(model: CRT, ids, targets, dtype: torch.dtype) -> tuple[dict, dict]:
    """The losses by exit, with their total as exit 0, and the gradient of every parameter."""
    state = {
        name: value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    total, losses = reference_loss(state, model.config, ids, targets, 0.3, training=True)
    total.backward()
    gradients = {name: state[name].grad for name, _ in model.named_parameters()}
    return losses | {0: total}, gradients


def check_gradients(model: CRT, checkpoint: bool) -> None:
    """The losses and gradients of the reference; in float32, as near to them as its own are."""
    model.train()
    ids, targets = random_ids(3, 13), random_ids(3, 13, seed=2)
    targets[0, -1] = targets[1, 4:] = -100  # two whole chunks among them
    exact = reference_gradients(model, ids, targets, torch.float64)
    plain = reference_gradients(model, ids, targets, model.loop_encoding.dtype)

    model.gradient_checkpointing = checkpoint
    losses = model(ids, targets=targets)
    losses[0] = total_loss(losses, 0.3)
    losses[0].backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    if model.loop_encoding.dtype == torch.float64:
        same((losses, gradients), exact)
    else:
        as_accurate((losses, gradients), plain, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("trm", VARIANTS)
@pytest.mark.parametrize("shape", ["", *SHAPES])
def test_logits_agree_with_the_reference(shape, trm, causal):
    for sharing, norm in (
        itertools.product(SHARINGS, NORMS) if not shape else [("shared_aux", "layer")]
    ):
        options = {"head_sharing": sharing, "norm": norm, "trm": trm, "causal": causal}
        check_logits(random_model(**options, **SHAPES.get(shape, {})))


@pytest.mark.parametrize("changes", (OPTIONS | COMBINATIONS).values(), ids=OPTIONS | COMBINATIONS)
def test_logits_agree_with_options(changes):
    check_logits(random_model(**changes))


@pytest.mark.parametrize("trm", VARIANTS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_batch_norm_trains_on_the_statistics_of_the_batch_once(trm, checkpoint):
    model = exact_model(norm="batch", trm=trm).train()
    ids = random_ids(2, 13)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = reference_logits(before, model.config, ids, training=True)
    model.gradient_checkpointing = checkpoint
    logits = model(ids)
    same(logits, expected)
    after_forward = {name: value.clone() for name, value in model.state_dict().items()}
    sum(values.mean() for values in logits.values()).backward()
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, after_forward[name]), f"the backward pass changed {name}"
            assert not torch.equal(value, before[name]), f"{name} did not follow the batch"


@pytest.mark.parametrize(
    ("path", "checkpoint"),
    [
        ("fused", False),
        ("fused", True),
        ("summed", True),
        ("whole", False),
        ("torch's chunks", True),
        ("our chunks", False),
    ],
)
@pytest.mark.parametrize("changes", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_losses_and_gradients_agree_with_the_reference(changes, path, checkpoint, monkeypatch):
    if path == "torch's chunks" and not loss._TORCH_CHUNKS:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(loss, "FUSED_ROWS", 5)  # of the 39 positions
    if path == "summed":
        monkeypatch.setattr(loss, "SUMMED_WEIGHTS", 0)
    elif path != "fused":
        monkeypatch.setattr(loss, "FUSED", False)
    if path.endswith("chunks"):
        monkeypatch.setattr(loss, "WHOLE_ELEMENTS", 0)
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 5 * TINY.vocab_size)
        monkeypatch.setattr(loss, "_TORCH_CHUNKS", path == "torch's chunks")
    model = random_model(**changes)
    # torch's own chunks add in float32 whatever they are given
    check_gradients(model if path == "torch's chunks" else model.double(), checkpoint)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("changes", (OPTIONS | COMBINATIONS).values(), ids=OPTIONS | COMBINATIONS)
def test_losses_and_gradients_agree_with_options(changes, checkpoint):
    check_gradients(exact_model(**changes), checkpoint)


def check_recomputation(model: CRT, loss) -> None:
    """`loss(checkpoint)` has one gradient whether activations are kept or computed again."""
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        loss(checkpoint).backward()
        gradients.append([value.grad.clone() for value in model.parameters()])
    same(*gradients)


@pytest.mark.parametrize("changes", [*({"norm": norm} for norm in NORMS), ALL_OPTIONS], ids=str)
def test_the_reference_recomputes_the_same_gradients(changes):
    model = exact_model(**changes, dropout=0.2)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    given_ = state, model.config, random_ids(2, 13), random_ids(2, 13, seed=2), 0.3

    def loss(checkpoint):
        return reference_loss(*given_, training=True, checkpoint=checkpoint)[0]

    check_recomputation(model, loss)


def test_every_parameter_is_used():
    cases = [
        {"head_sharing": sharing, "norm": norm, "trm": trm}
        for sharing, norm, trm in itertools.product(SHARINGS, NORMS, VARIANTS)
    ]
    for changes in [*cases, *OPTIONS.values(), ALL_OPTIONS]:
        model = random_model(**changes)
        losses = model(random_ids(2, 13), targets=random_ids(2, 13, seed=2))
        sum(losses.values()).backward()
        for name, value in model.named_parameters():
            assert value.grad is not None and value.grad.abs().max() > 0, (name, changes)


@pytest.mark.parametrize(
    "changes", [*({"trm": trm, "dropout": 0.3} for trm in VARIANTS), *DROPOUTS.values()], ids=str
)
def test_dropout_acts_where_the_reference_has_it(changes):
    model = random_model(**changes).train()
    draws = 2000
    ids = random_ids(1, 5).expand(draws, 5).contiguous()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = reference_logits(model.state_dict(), model.config, ids, training=True)
        logits = model(ids)
    for loop in model.config.head_loops:
        spread = expected[loop].std(0)  # (T, V)
        error = (logits[loop].mean(0) - expected[loop].mean(0)).abs() / spread
        assert error.max() < 6 * math.sqrt(2 / draws)
        ratio = (logits[loop].std(0) / spread).log()
        # five deviations of the mean, over seeds; over six of one ratio, 1 / sqrt(draws)
        assert ratio.mean().abs() < 0.02 and ratio.abs().max() < 0.15


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.2}, {"trm": "conv_linear", "dropout": 0.2}, DROPOUTS["all options"]],
    ids=str,
)
def test_checkpointing_repeats_the_same_dropout(changes):
    model = exact_model(**changes).train()

    def loss(checkpoint):
        model.gradient_checkpointing = checkpoint
        return sum(model(random_ids(2, 13), targets=random_ids(2, 13, seed=2)).values())

    check_recomputation(model, loss)


def test_asking_for_some_exits_gives_those_of_all():
    model = exact_model()
    ids, targets = random_ids(2, 13), random_ids(2, 13, seed=2)
    for arguments in ({}, {"targets": targets}):
        with torch.no_grad():
            full = model(ids, **arguments)
            assert tuple(full) == model.config.head_loops
            for exits in [(1,), (4,), (1, 4), [3], (1, 3, 4)]:
                found = model(ids, exits=exits, **arguments)
                assert sorted(found) == list(exits)
                for loop in exits:
                    same(found[loop], full[loop])


@pytest.mark.parametrize(
    ("sharing", "count"),
    [("separate", 143_516_928), ("shared_aux", 92_053_760), ("tied", 41_114_880)],
)
def test_parameter_counts_of_table_1(sharing, count):
    with torch.device("meta"):
        model = CRT(ModelConfig(head_sharing=sharing))
    assert sum(value.numel() for value in model.parameters()) == count


PROBED = {
    **{
        f"{trm}, {head}": {"trm": trm, "head_sharing": head}
        for trm in VARIANTS
        for head in SHARINGS
    },
    **OPTIONS,
    **COMBINATIONS,
    "all options": ALL_OPTIONS,
}


@pytest.mark.parametrize("changes", PROBED.values(), ids=PROBED)
def test_a_causal_model_does_not_see_later_tokens_and_a_symmetric_one_does(changes):
    for length in (1, 2, 13, 29, 61):
        causal, symmetric = (random_model(**{**changes, "causal": yes}) for yes in (True, False))
        assert exits_that_see_later_tokens(causal, length) == set()
        config = symmetric.config
        leaks = config.trm != "linear" and config.kernel_size > 1 and length > 1
        leaking = set(config.head_loops) if leaks else set()
        assert exits_that_see_later_tokens(symmetric, length) == leaking


@pytest.mark.parametrize(("causal", "leaking"), [(True, set()), (False, {1, 3, 4})])
def test_causality_across_the_tiles_of_a_fused_attention(causal, leaking):
    model = random_model(causal=causal, max_seq_len=1031)
    assert exits_that_see_later_tokens(model, 1031, [1, 127, 128, 512, 515, 1030]) == leaking


@settings(max_examples=60)
@given(data=st.data())
def test_causality_holds_for_any_position_row_and_option(data):
    model = random_model(
        trm=data.draw(st.sampled_from(VARIANTS)),
        norm=data.draw(st.sampled_from(NORMS)),
        kernel_size=data.draw(st.sampled_from([1, 3, 5])),
        dilations=data.draw(st.sampled_from([(1,), (1, 2, 4), (5, 3)])),
        share_cycle_weights=data.draw(st.booleans()),
    )
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 64))
    row, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, length - 1))
    ids = random_ids(rows, length)
    changed = ids.clone()
    changed[row, j] = data.draw(st.integers(0, TINY.vocab_size - 1))
    others = torch.arange(rows) != row
    with torch.no_grad():
        before, after = model(ids), model(changed)
    for loop in model.config.head_loops:
        assert torch.equal(before[loop][:, :j], after[loop][:, :j])
        assert torch.equal(before[loop][others], after[loop][others])


BAD_CALLS = {
    "token too large": (torch.tensor([[1, 37]]), {}, "37"),
    "token negative": (torch.tensor([[1, -1]]), {}, "-1"),
    "too long": (torch.zeros(1, 65, dtype=torch.int64), {}, "65.*64"),
    "loop 0": (torch.tensor([[1]]), {"exits": (0,)}, "0"),
    "loop past the last": (torch.tensor([[1]]), {"exits": (1, 5)}, "5"),
    "negative loop": (torch.tensor([[1]]), {"exits": (-1,)}, "-1"),
    "loop without a head": (torch.tensor([[1]]), {"exits": (2,)}, "2"),
    "float ids": (torch.tensor([[1.0]]), {}, "float"),
    "one dimension": (torch.tensor([1, 2]), {}, "2"),
    "target too large": (torch.tensor([[1]]), {"targets": torch.tensor([[37]])}, "37"),
    "target negative": (torch.tensor([[1]]), {"targets": torch.tensor([[-5]])}, "-5"),
    "targets too many": (torch.tensor([[1]]), {"targets": torch.tensor([[1, 2]])}, "1, 2"),
    "targets transposed": (torch.tensor([[1], [2]]), {"targets": torch.tensor([[1, 2]])}, "1, 2"),
}


@pytest.mark.parametrize(("ids", "arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_clear_error(ids, arguments, message):
    with pytest.raises(InputError, match=message):
        random_model()(ids, **arguments)
