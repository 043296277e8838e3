"""The explorer: pure functions of a trace, and controls driven as a hand would."""

import datetime
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from markupsafe import escape
from tiny_rows import judged

from crt_lib import InputError
from crt_lib.bench.decode import Pace, measured_pace
from crt_lib.exits.choice import Choice, Choices
from crt_lib.exits.policy import Policy
from crt_lib.exits.trace import GUESSES, Trace, apply_policy, make_passage
from crt_lib.show import own as own_widgets
from crt_lib.show.explorer import (
    ALLOWED,
    KEPT,
    Explorer,
    look,
    numbers_html,
    passage_html,
    preset,
)
from crt_lib.show.own import PARTS, parts_of
from crt_lib.study.policies import THRESHOLDS, policies_of, promised_rows

TEXT = "the cat sat on\nfive <b>six"
PACE = Pace(1e-3, 2e-3, 5e-4)


@pytest.fixture(scope="module")
def passage(scored):
    model, data, _ = scored
    return make_passage(model, data.tokenizer, TEXT)


def test_a_view_is_the_policy_beside_full_depth(scored):
    *_, trace = scored
    view = look(trace, Policy("confidence", 0.5, 0.5, 1.0), PACE)
    assert view.outcome.loss == apply_policy(trace, Policy("confidence", 0.5, 0.5, 1.0)).loss
    assert view.full.mean_loops == trace.config.n_loops
    said = dict(view.lines())
    full = 1 / (PACE.fixed + 4 * PACE.loop + PACE.head)
    ratio = PACE.tokens_per_second(view.outcome) / full
    assert said["tokens/s, from measured"].endswith(f"({ratio:.2f}x full depth)")
    assert said["mean loops"].startswith(f"{view.outcome.mean_loops:.2f} of 4")
    assert f"{view.outcome.token_ppl:.2f}" in numbers_html(view)


def test_the_oracle_has_no_speed_and_no_more_loss_than_needed(scored):
    *_, trace = scored
    view = look(trace, None, PACE)
    assert view.pace is None and "tokens/s" not in numbers_html(view)
    assert view.outcome.loss <= view.full.loss


def test_a_pace_is_found_again_from_rows():
    rows = [
        {"way": f"exit {k}", "batch": 1, "decoded_loops": k, "decoded_heads": heads}
        | {"decoded_asks": asks}
        for k, heads, asks in (
            (1, 1.0, 0),
            (2, 1.0, 0),
            (3, 1.0, 0),
            (2.5, 2.5, 2.5),
            (2.2, 1.0, 2),
        )
    ]
    for row in rows:
        seconds = 1e-3 + 2e-3 * row["decoded_loops"] + 5e-4 * row["decoded_heads"]
        row["tokens_per_second"] = 1 / (seconds + 1e-4 * row["decoded_asks"])
    rows.append({"way": "GPT-2", "batch": 1, "decoded_loops": None, "tokens_per_second": 1.0})
    rows.append(rows[0] | {"way": "no cache", "tokens_per_second": 1.0})
    rows.append(rows[0] | {"batch": 8, "tokens_per_second": 1.0})
    pace = measured_pace(rows)
    assert (pace.fixed, pace.loop, pace.head, pace.ask) == pytest.approx((1e-3, 2e-3, 5e-4, 1e-4))
    with pytest.raises(InputError, match="three or more"):
        measured_pace(rows[:2])


def test_presets(scored):
    *_, trace = scored
    assert preset("paper", trace, "margin") == Policy("confidence", 0.92, 0.8, 0.98)
    assert preset("oracle", trace, "margin") is None
    assert preset("full depth", trace, "margin") == Policy()
    found = look(trace, preset("calibrated", trace, "similarity"))
    assert found.outcome.token_ppl <= found.full.token_ppl * (1 + ALLOWED) * (1 + 1e-9)


def test_a_passage_gives_its_text_back_and_its_guesses(scored, passage, tmp_path):
    passage.save(tmp_path / "p.safetensors")
    again = Trace.load(tmp_path / "p.safetensors")
    assert "".join(again.about["tokens"]) == TEXT
    shown = passage_html(again, Policy(fixed=2))
    assert shown == passage_html(passage, Policy(fixed=2))
    tokens = re.findall(r'<span class="crt-token" [^>]*>(.*?)</span>', shown)
    assert len(tokens) == len(again.about["tokens"])
    for exit_, right in zip(again.about["guesses"], passage.right.T, strict=True):
        for token, place, best in zip(again.about["tokens"], exit_, right, strict=True):
            words, sure = zip(*place, strict=True)
            assert len(words) == GUESSES and list(sure) == sorted(sure, reverse=True)
            assert words[0] == token or not best
            assert escape(f"{words[0]!r} {sure[0]:.0%}") in shown
    assert "<b>" not in shown and "loop 4: " in shown
    with pytest.raises(InputError, match="passage has 0 tokens"):
        make_passage(scored[0], scored[1].tokenizer, "")


def test_a_token_has_the_colour_of_its_exit(passage):
    one, two = (passage_html(passage, Policy(fixed=loop)) for loop in (1, 2))
    assert one != two
    styles = set(re.findall(r'class="crt-token" style="([^"]*)"', one))
    assert len(styles) == 1
    mixed = passage_html(passage, Policy("confidence", 0.3, 0.3, 1.0))
    exits = apply_policy(passage, Policy("confidence", 0.3, 0.3, 1.0)).exit
    assert len(set(re.findall(r'class="crt-token" style="([^"]*)"', mixed))) == len(set(exits))


@pytest.fixture
def explorer(scored, passage):
    return Explorer(scored[2], passage, PACE)


def test_all_that_shows_is_of_the_policy_that_the_controls_say(explorer):
    """Whatever is moved: 40 moves of controls drawn by chance."""
    trace, rng = explorer.trace, random.Random(0)
    thresholds = [explorer.tau0, explorer.tau_min, explorer.decay]
    choices = [explorer.preset, explorer.criterion, explorer.last]
    assert all(slider.continuous_update for slider in thresholds)  # they answer while they move
    pictures, shown = set(), set()
    for _ in range(40):
        control = rng.choice([*thresholds, *choices, *explorer.exits.values()])
        options = [0.0, 0.02, 0.5, 1.0] if control in thresholds else [True, False]
        new = rng.choice(getattr(control, "options", options))
        moved, before = new != control.value, explorer.preset.value
        control.value = new
        policy, kind = explorer.policy(), explorer.preset.value
        keeps = control is explorer.criterion and before == "calibrated"
        if moved and control is not explorer.preset and not keeps:
            assert kind == "own"
        assert explorer.tau_min.value <= explorer.tau0.value
        assert (policy is None) == (kind == "oracle")
        assert explorer.numbers.value == numbers_html(look(trace, policy, PACE))
        assert explorer.text.value == passage_html(explorer.passage, policy)
        assert ("tokens/s" in explorer.numbers.value) == (kind != "oracle")
        pictures.add(explorer.image.value)
        shown.add(explorer.numbers.value)
        if policy and kind == "own":
            allowed = [loop for loop, box in explorer.exits.items() if box.value]
            taken = {trace.loops[at] for at in apply_policy(trace, policy).exit}
            assert taken <= {*allowed, explorer.last.value}
            assert max(taken) <= explorer.last.value
            assert policy.criterion == (explorer.criterion.value if allowed else None)
    assert len(pictures) > 5 and len(shown) > 5
    assert all(picture[:4] == b"\x89PNG" for picture in pictures)


def test_a_policy_that_is_kept_stays_beside_the_one_that_moves(explorer):
    explorer.last.value = 1
    trace, first, alone = explorer.trace, explorer.policy(), explorer.image.value
    assert explorer.numbers_beside.value == explorer.text_beside.value == ""
    explorer.keep.value = True
    for control, new in ((explorer.last, 3), (explorer.preset, "oracle")):
        control.value = new
        policy = explorer.policy()
        assert explorer.numbers.value == numbers_html(look(trace, policy, PACE))
        assert explorer.numbers_beside.value == KEPT + numbers_html(look(trace, first, PACE))
        assert explorer.text_beside.value == KEPT + passage_html(explorer.passage, first)
        now, kept = (look(trace, shown).outcome for shown in (policy, first))
        picture = explorer._picture(policy.criterion if policy else None)
        assert explorer.image.value == picture.png(now, kept)
        assert len({picture.png(now, kept), picture.png(now, now), picture.png(now)}) == 3
    explorer.preset.value, explorer.last.value = "own", 1
    explorer.keep.value = False
    assert explorer.numbers_beside.value == explorer.text_beside.value == ""
    assert explorer.image.value == alone


def test_presets_move_the_controls(explorer):
    explorer.criterion.value = "similarity"
    explorer.preset.value = "calibrated"
    policy = preset("calibrated", explorer.trace, "similarity")
    assert explorer.numbers.value == numbers_html(look(explorer.trace, policy, PACE))
    explorer.preset.value = "oracle"
    assert explorer.policy() is None and "tokens/s" not in explorer.numbers.value
    explorer.preset.value = "paper"
    assert explorer.criterion.value == "confidence" and explorer.tau0.value == 0.92
    assert explorer.policy().threshold(3) == pytest.approx(0.92 * 0.98**2)


def test_what_decoding_loses_is_said_of_policies_that_were_decoded(scored):
    *_, trace = scored
    rows = [judged("paper", Policy("confidence"), 1.5, 0.01), judged("exit 2", Policy(fixed=2))]
    exits = trace.loops[:-1]
    for policy in (Policy("confidence"), Policy("confidence", exits=exits, fixed=trace.loops[-1])):
        said = dict(look(trace, policy, judged=rows).lines())["token PPL as decoded"]
        assert said == f"{math.exp(1.5):.2f} ({math.expm1(0.01):+.2%})"
    for policy in (Policy("confidence", 0.93), Policy("confidence", exits=exits[1:]), None):
        assert dict(look(trace, policy, judged=rows).lines())["token PPL as decoded"] == (
            "not measured"
        )
    for same in (
        Policy(fixed=2),
        Policy("margin", exits=(), fixed=2),
        Policy("gate", exits=(3,), fixed=2),
    ):
        assert look(trace, same, judged=rows).judged == rows[1]


def test_calibrated_policies_that_are_given(scored, passage):
    *_, trace = scored
    given = [
        judged("gate", Policy("gate", 0.7, 0.7, 1.0, fixed=3)),
        judged("margin", Policy(fixed=2)),
    ]
    explorer = Explorer(trace, passage, PACE, judged=given)
    explorer.criterion.value = "gate"
    explorer.preset.value = "calibrated"
    assert explorer.policy() == Policy("gate", 0.7, 0.7, 1.0, (1, 2, 3), 3)
    explorer.criterion.value = "margin"
    assert "mean loops</td><td><b>2.00" in explorer.numbers.value


def test_what_crt_generate_takes_is_a_preset(scored, passage):
    *_, trace = scored
    ways = {
        "full": Choice(),
        "margin": Choice(Policy("margin", 0.6, 0.6, 1.0), speedup=1.3, paid=0.01),
        "speculation from 1": Choice(draft_loop=1, speedup=2.0),
    }
    choices = Choices(0.005, ways)
    rows = [judged("margin", Policy("margin", 0.1, 0.1, 1.0)), *promised_rows(choices, 3.0)]
    explorer = Explorer(trace, passage, PACE, judged=rows, choices=choices)
    for name in ("crt generate", "calibrated"):
        explorer.criterion.value, explorer.preset.value = "margin", name
        assert explorer.policy() == Policy("margin", 0.6, 0.6, 1.0, (1, 2, 3))
        assert "20.29 (+1.01%)" in explorer.numbers.value  # exp(3.01), as decoded
    assert "crt generate" not in Explorer(trace, judged=rows[:1]).preset.options


@pytest.mark.parametrize("column", ["policy", "taken", "criterion", "last", *THRESHOLDS])
def test_a_table_of_policies_without_a_column_says_which(column):
    row = judged("paper", Policy("confidence"))
    assert policies_of([row])
    del row[column]
    with pytest.raises(InputError, match=f"no column {column}"):
        policies_of([row])


def test_without_passage_and_measurements(scored):
    assert len(Explorer(scored[2]).box.children) == 3


def test_ones_own_text_is_read(scored, passage):
    model, data, trace = scored
    explorer = Explorer(trace, passage, PACE, reader=(model, data.tokenizer))
    explorer.preset.value = "own"
    explorer.own.text.value = "the mat <i>sat</i>"
    explorer.own.read.click()
    expected = make_passage(model, data.tokenizer, "the mat <i>sat</i>")
    assert explorer.text.value == passage_html(expected, explorer.policy())
    explorer.tau0.value = 0.01
    assert explorer.text.value == passage_html(expected, explorer.policy())

    explorer.own.text.value = ""
    explorer.own.read.click()
    assert "0 tokens" in explorer.own.said.value and "\n" not in explorer.own.said.value
    assert explorer.text.value == passage_html(expected, explorer.policy())
    explorer.own.text.value = "the cat"
    explorer.own.read.click()
    assert explorer.own.said.value == ""


def test_a_word_longer_than_a_window_is_cut():
    by_byte = SimpleNamespace(encode=str.encode)
    for text in ("\u8a9e" * 100, "a " + "b" * 100 + "\n"):
        parts = parts_of(by_byte, text, 16)
        assert "".join(parts) == text
        assert all(0 < len(part.encode()) <= 16 for part in parts)


@pytest.mark.parametrize("version", [7, 8])
def test_a_file_is_read_in_parts(scored, passage, version):
    model, data, trace = scored
    explorer = Explorer(trace, passage, PACE, reader=(model, data.tokenizer))
    own, text = explorer.own, "the cat sat on the mat five six\n" * 40
    most = model.config.max_seq_len
    parts = parts_of(data.tokenizer, text, most)
    assert "".join(parts) == text and 1 < len(parts) <= PARTS
    assert all(0 < len(data.tokenizer.encode(part)) <= most for part in parts)

    def upload(content):
        value = {"content": content} if version == 7 else {"content": memoryview(content)}
        value = {"own.txt": value} if version == 7 else (value,)
        own.file = SimpleNamespace(value=value)
        own._guarded(own._parts)

    upload(text.encode())
    assert own.progress.value == own.progress.max == len(parts) == len(own.part.options)
    for number in (1, len(parts)):
        own.part.value = number
        expected = make_passage(model, data.tokenizer, parts[number - 1])
        assert explorer.text.value == passage_html(expected, explorer.policy())
    upload(b"\xff\xfe")
    assert "UTF-8" in own.said.value
    upload(20 * text.encode())
    assert f"the first {PARTS} of" in own.said.value


def test_an_uploaded_file_is_asked_for(scored, passage):
    model, data, trace = scored
    own = Explorer(trace, passage, reader=(model, data.tokenizer)).own
    file = {"name": "a.txt", "type": "", "size": 7, "content": memoryview(b"the cat")}
    file["last_modified"] = datetime.datetime.now(datetime.UTC)
    own.file.value = (file,) if isinstance(own.file.value, tuple) else {"a.txt": file}
    assert own.passages[0].about["text"] == "the cat"


def test_ones_own_run_is_opened(scored, passage, monkeypatch):
    model, data, trace = scored
    explorer = Explorer(trace, passage, PACE, reader=(model, data.tokenizer))
    explorer.run.folder.value = "nowhere"
    explorer.run.open.click()
    assert "nowhere" in explorer.run.said.value
    there = {"folder": Path("mine"), "checkpoint": "s1", "judged": [], "choices": None}
    there |= {"test": trace, "valid": trace, "passage": passage}
    there |= {"model": model, "tokenizer": data.tokenizer}
    monkeypatch.setattr(own_widgets, "analyse", lambda folder: SimpleNamespace(**there))
    explorer.run.open.click()
    assert explorer.run.said.value == "" and explorer.opened.trace is trace
    assert explorer.box.children[:-1] == explorer.opened.box.children[:-1]
    assert explorer.box.children[-1] is explorer.run.box
