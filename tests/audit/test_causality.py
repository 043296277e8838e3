"""The probes for causality: they clear what is sound and convict every planted leak.

Laws: a leak of any onset, distance and period is found, and one that any token triggers, also from
any position on; a probe that asks many rows at once says what one that asks one at a time does;
what is not asked is said.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from crt_lib import causality_report
from crt_lib.audit import assert_causal, probes, reach
from crt_lib.audit.asking import Asked, probe_ids
from crt_lib.audit.page import html_page
from crt_lib.audit.report import SAYS, CausalityReport
from crt_lib.audit.zoo import PLANTED, SOUND, VOCAB, Mixed, ahead

LENGTH = 16


def made(name, seed=0):
    torch.manual_seed(seed)
    make = SOUND.get(name) or PLANTED[name][0]
    return make()


@pytest.mark.parametrize("name", PLANTED)
def test_convicts(name):
    report = causality_report(made(name), VOCAB, length=LENGTH)
    assert report.status == 1 and PLANTED[name][1] in report.convicting, str(report)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SOUND)
def test_clears(name, seed):
    report = causality_report(made(name, seed), VOCAB, length=LENGTH, seed=seed)
    assert report.status == 0 and not report.convicting, str(report)
    assert report.first_leaking_offset is None and report.example is None


NEAREST = {
    "CRT as released, symmetric": 1,
    "mask off by one": 1,
    "batch norm over time, in training": 1,
    "five ahead": 5,
    "thirty ahead": 30,
    "two hundred ahead": 200,
    "at ten positions": 2,
    "labels in its logits": 1,
    "the row before": None,
}


@pytest.mark.parametrize("name, nearest", NEAREST.items())
def test_the_nearest_leak(name, nearest):
    report = causality_report(made(name), VOCAB, length=LENGTH)
    assert report.first_leaking_offset == nearest
    if report.convicting[0] in ("tokens", "far", "lengths"):
        assert report.example.last - report.example.t == nearest
        assert f"token {report.example.last} alone moves" in str(report)


def test_the_zoo_is_large_enough():
    assert len(PLANTED) >= 25 and len(SOUND) >= 15
    assert {probe for _, probe in PLANTED.values()} == set(reach.PROBES)


@given(st.integers(0, 46), st.integers(1, 47), st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_any_onset_distance_and_period(onset, distance, period, data):
    residue, context, V = data.draw(st.integers(0, period - 1)), 48, 11
    where = (torch.arange(context) >= onset) & (torch.arange(context) % period == residue)

    def leaks(ids):
        later = F.pad(F.one_hot(ids, V)[:, distance:], (0, 0, 0, min(distance, ids.shape[1])))
        return F.one_hot(ids, V) + 1e-3 * later * where[: ids.shape[1], None]

    exists = bool(where[: context - distance].any())
    report = causality_report(leaks, V, length=8, context=context)
    assert report.leaks == exists
    assert report.first_leaking_offset == (distance if exists else None)


@given(st.integers(2, 48))
def test_any_length_from_which_on_logits_differ(least):
    def counts(ids):
        return F.one_hot(ids, 11) * (1.0 + (ids.shape[1] >= least))

    convicting = causality_report(counts, 11, length=8, context=48).convicting
    assert convicting == ["prefix" if least <= 8 else "lengths"]


@given(st.integers(0, 49), st.integers(1, 6), st.booleans())
def test_any_token_of_the_vocabulary(token, distance, own):
    def leaks(ids):
        later = F.pad(F.one_hot(ids, 50)[:, distance:], (0, 0, 0, min(distance, ids.shape[1])))
        if own:  # at a token the one before which is the trigger
            later = later * (F.pad(ids, (distance - 1, 0))[:, : ids.shape[1]] == token)[..., None]
        else:
            later = later * F.one_hot(torch.tensor(token), 50)
        return F.one_hot(ids, 50).float() + later

    asked = Asked(leaks, probe_ids(leaks, 50, 8, 0), 50)
    if own and distance > 1:  # the trigger stands before the window's changed token
        return
    assert any(len(x.pairs) for x in reach.vocabulary(asked).values())
    assert "(100%)" in asked.covered["vocabulary"] and str(token) in str(asked.covered)


@given(st.integers(0, 49), st.integers(0, 38), st.booleans())
@settings(max_examples=30)
def test_any_token_from_any_position_on(token, onset, own):
    def leaks(ids):
        trigger = F.pad(ids, (0, int(not own)), value=-1)[:, int(not own) :] == token
        later = F.pad(F.one_hot(ids, 50)[:, 1:], (0, 0, 0, 1))
        late = torch.arange(ids.shape[1]) >= onset
        return F.one_hot(ids, 50).float() + later * (trigger & late)[..., None]

    asked = Asked(leaks, probe_ids(leaks, 50, 8, 0), 50, context=40)
    (found,) = reach.vocabulary(asked).values()
    assert [38, 39] in found.pairs.tolist() and found.offsets == (1, 1)
    assert "(100%)" in asked.covered[reach.WORDS_LATE] and str(token) in str(asked.covered)


def test_what_words_are_asked_late_is_said():
    def leaks(ids):
        late = torch.arange(ids.shape[1]) >= 60
        return (F.pad(ids == 17, (0, 1))[:, 1:] & late)[..., None] + F.one_hot(ids, 500).float()

    report = causality_report(leaks, 500, context=80, seconds=100)
    assert report.convicting == ["vocabulary"] and report.first_leaking_offset == 1
    assert "17 (or" in report.covered["tokens that are seen"]
    assert not any("at the end" in said for said in report.not_excluded)
    hurried = causality_report(leaks, 500, context=80, seconds=0)
    assert hurried.covered[reach.WORDS_LATE].startswith("64 of 500 tokens (12%)")
    assert any("at the end" in said for said in hurried.not_excluded)
    for said in (report.not_excluded, hurried.not_excluded):
        assert "a leak that one token triggers only at positions where it was not asked" in said


@given(st.integers(2, 3000))
def test_cuts_are_all_positions_but_the_last(length):
    cuts = reach.cuts_of(length)
    assert sorted(cuts) == list(range(length - 1))
    assert cuts[0] == length - 2 and set(cuts[:32]) >= set(range(max(length - 20, 0), length - 1))


@pytest.mark.parametrize("name", ["CRT as released, symmetric", "masked attention", "recurrent"])
def test_many_rows_at_once_say_what_one_at_a_time_does(name):
    model = made(name).eval()
    asked = Asked(model, probe_ids(model, VOCAB, 9, 0), VOCAB)
    with torch.no_grad():
        for loop, fast in probes.tokens(asked).items():
            base = asked(asked.ids)[loop]
            other = asked.others(asked.ids, seed=1)
            for j in range(9):
                row = torch.where(torch.arange(9) == j, other, asked.ids)
                slow = (asked(row)[loop] - base).abs().amax(-1)[0]
                assert torch.allclose(fast.influence[:, j], slow, atol=1e-5)
            alone = probes.tokens(replace(asked, one_by_one=True))[loop]
            assert torch.equal(alone.pairs, fast.pairs)


@pytest.mark.parametrize("name", ["CRT, causal, with exits", "GPT-2 of transformers"])
def test_what_is_asked_of_a_module(name):
    report = causality_report(made(name), VOCAB, length=LENGTH)
    assert {*report.findings, *report.left_out} == set(reach.PROBES)
    assert set(report.left_out) <= {"padding", "labels"}
    assert list(report.findings) == [x for x in reach.PROBES if x in report.findings]
    for probe in ("tokens", "training", "gradient"):
        for found in report.findings[probe].values():
            assert (found.influence.diagonal() > 0).all(), f"{probe} is blind"


def test_each_probe_finds_what_others_miss():
    alone = {
        "batch norm over time, in training": "training",
        "scaled by a length over 100": "lengths",
        "at one position": "far",
        "labels in its loss": "labels",
        "the row before, from position 100 on": "rows",
        "scaled by the number of rows": "count",
        "a cache that forgets": "decode",
        "padding counts as positions": "padding",
    }
    for name, probe in alone.items():
        report = causality_report(made(name), VOCAB, length=LENGTH)
        assert report.convicting == [probe]
        assert str(report).startswith(f"verdict: {SAYS.get(probe, 'sees the future')}\n")


def test_a_plain_function():
    def peeks(ids):
        return F.one_hot(ids.roll(-1, 1), VOCAB).float()

    report = causality_report(peeks, length=LENGTH)
    assert report.leaks and report.first_leaking_offset == 1
    assert {"training", "gradient", "decode", "labels", "padding"} == set(report.left_out)
    assert "sees the future" in str(report) and "is_causal=True" in str(report)


def test_what_a_slow_model_is_not_asked_is_said():
    model = made("masked attention")
    report = causality_report(model, VOCAB, seconds=0)
    fewer = re.match(r"(\d+) of 255 in a row of 256", report.covered["cuts"])
    assert fewer and int(fewer[1]) < 255
    assert any("no cut crossed" in said for said in report.not_excluded)
    whole = causality_report(model, VOCAB)
    assert whole.covered["cuts"].startswith("all 255")
    assert not any("no cut crossed" in said for said in whole.not_excluded)
    assert causality_report(model, VOCAB, context=20).covered["positions"].startswith("0-19")


def test_a_loss_that_is_not_plain_is_not_judged():
    class Smoothed(Mixed):
        def forward(self, ids, labels=None):
            logits = super().forward(ids)
            if labels is None:
                return logits
            return 2.0 + F.cross_entropy(logits[0], labels[0])

    report = causality_report(Smoothed(), VOCAB, length=LENGTH)
    assert not report.leaks and "no cross-entropy" in report.left_out["labels"]


def test_assert_causal():
    assert_causal(made("mean of the past"), VOCAB, length=LENGTH)
    with pytest.raises(AssertionError, match="verdict: sees the future"):
        assert_causal(made("no mask"), VOCAB, length=LENGTH)


def test_the_report_as_json_and_as_a_page():
    class Evil(Mixed):
        def forward(self, ids):
            if ids.shape[1] == 3:
                raise ValueError("<script>alert(1)</script>")
            return super().forward(ids)

    report = causality_report(Evil(ahead(5)), VOCAB, length=LENGTH)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["status"] == 1 and plain["first_leaking_offset"] == 5
    assert plain["convicting"] == report.convicting
    page = html_page(report, "<b>mine</b>")
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    leaking = sum(len(x.pairs) for x in report.findings["tokens"].values())
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 2 and pictures[0].count("#d55e00") == leaking
    for picture in pictures:
        assert len(ElementTree.fromstring(picture).findall(".//{*}text")) == 2
    assert verdict_class(page) == "leak"


def verdict_class(page):
    return re.search(r'<p class="verdict (\w+)">', page)[1]


def test_a_page_without_pictures_says_why():
    for name, kind in (
        ("noise of its own", "clean"),
        ("noise of its own, and the next token", "leak"),
    ):
        page = html_page(causality_report(made(name), VOCAB, length=4), "it")
        assert verdict_class(page) == kind and ("How to fix" in page) == (kind == "leak")
        assert "Two-sample tests judged it" in page and "<svg" not in page
        assert "No token could be changed" not in page
    unasked = CausalityReport({}, {"tokens": "it fails"}, 4, 4)
    page = html_page(unasked, "it")
    assert unasked.status == 2 and verdict_class(page) == "unknown"
    assert "No token could be changed" in page and ".unknown {" in page
