"""Distilled losses: linear in the share, the text's at 0, and nothing to learn where both agree."""

import torch
from closeness import same
from hypothesis import given, settings, strategies as st
from tiny_models import exact_model

from crt_lib.data import NOT_SCORED
from crt_lib.exits import distil
from crt_lib.exits.decode import Sampling, generate
from crt_lib.exits.distil import DistilledLosses

torch.manual_seed(0)
IDS = torch.randint(37, (2, 9))
TARGETS = torch.randint(37, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, NOT_SCORED)
EXITS = (1, 3, 4)
LONG = torch.randint(37, (2, 20))
ONE = Sampling(temperature=1.0)


def losses(share, model=None, teachers=None, targets=TARGETS):
    model = model or exact_model()
    return DistilledLosses(model, teachers or [model], share)(IDS, EXITS, targets)


def test_of_the_text_alone_they_are_the_models_own():
    model = exact_model()
    own = model(IDS, EXITS, targets=TARGETS)
    found = losses(0.0, model)
    for loop in EXITS:
        same(found[loop], own[loop])


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 1))
def test_they_are_linear_in_the_share(share):
    text, told, found = losses(0.0), losses(1.0), losses(share)
    for loop in EXITS:
        same(found[loop], (1 - share) * text[loop] + share * told[loop])


def test_told_they_are_the_cross_entropy_with_the_teachers_mean():
    model, others = exact_model(), [exact_model(), exact_model()]
    with torch.no_grad():
        for parameter in others[1].parameters():
            parameter.mul_(1.1)
    said = [other(IDS, (4,))[4].softmax(-1) for other in others]
    q = (said[0] + said[1]) / 2
    found = losses(1.0, model, others)
    for loop, logits in model(IDS, EXITS).items():
        nats = -(q * logits.log_softmax(-1)).sum(-1)
        same(found[loop], nats[TARGETS != NOT_SCORED].mean())


def test_the_last_exit_has_nothing_to_learn_from_itself():
    model = exact_model()
    losses(1.0, model)[4].backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-12


def test_the_teacher_stays_as_it_was():
    model, teacher = exact_model(dropout=0.5), exact_model(dropout=0.5)
    model.train(), teacher.train()
    sum(losses(0.5, model, [teacher]).values()).backward()
    assert all(part.training for part in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(*(losses(1.0, model.eval(), [teacher])[4] for _ in range(2)))


def test_what_teachers_write_begins_as_the_text_and_is_scored_whole(monkeypatch):
    monkeypatch.setattr(distil, "PROMPT", 4)
    model, teachers = exact_model(), [exact_model(1), exact_model(2)]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        made = DistilledLosses(model, teachers, 1.0, written=True)
        inputs, targets = made._written(IDS)
    assert torch.equal(inputs[:, :4], IDS[:, :4])
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and inputs.shape == (2, 8)
    written = [
        [new.tokens for new in generate(teacher, IDS[:, :4].tolist(), 5, sampling=ONE, seed=seed)]
        for teacher in teachers
        for seed in _seeds(1)
    ]
    assert targets[:, 3:].tolist() in written


def _seeds(seed):
    torch.manual_seed(seed)
    return torch.randint(2**31, (2,)).tolist()[:1]


def test_a_seed_repeats_what_they_write():
    def once(seed):
        torch.manual_seed(seed)
        model = exact_model()
        return DistilledLosses(model, [model], 1.0, written=True)._written(LONG)[1].tolist()

    assert once(1) == once(1) != once(2)
