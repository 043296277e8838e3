"""What was calibrated comes back from its file, and only what was calibrated is taken by name."""

import pytest
import typer

from crt_lib import InputError
from crt_lib.commands.options import percent
from crt_lib.exits.choice import Choice, Choices, choose, drafts
from crt_lib.exits.policy import CRITERIA, Policy

GATE = Policy("gate", 0.9, 0.9, 1.0, exits=(1, 2), fixed=3)
CHOICES = Choices(
    0.005,
    {
        "full": Choice(),
        "3": Choice(Policy(fixed=3), above=-0.001, high=0.002, speedup=1.2),
        "gate": Choice(GATE, above=0.001, high=0.004, speedup=1.3),
        "speculation from 1": Choice(draft_loop=1, speedup=0.9),
        "speculation from 2": Choice(draft_loop=2, speedup=1.4),
        "exit 3, speculation from the text": Choice(
            Policy(fixed=3), draft_loop=0, above=-0.001, high=0.002, speedup=1.5
        ),
    },
    {
        "1": Choice(Policy(fixed=1), above=0.06, high=0.07),
        "similarity": Choice(Policy("similarity"), above=0.004, high=0.006),
    },
)


def test_choices_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "exits.json"
    assert Choices.load(path, "s1") is None
    CHOICES.save(path, "s1")
    assert Choices.load(path, "s1") == CHOICES
    assert Choices.load(path, "s2") is None  # of another checkpoint
    for text in ("", "[]", '{"ways": {}}', '{"ways": {"full": {}}, "budget": 1, "checkpoint": ""}'):
        path.write_text(text)
        with pytest.raises(InputError, match="crt calibrate"):
            Choices.load(path, "s1")


def test_the_fastest_is_taken_unless_another_is_named():
    assert choose(CHOICES) == CHOICES.ways["exit 3, speculation from the text"]
    assert choose(CHOICES, drafted=False) == CHOICES.ways["gate"]
    assert choose(CHOICES, "gate", budget=0.005).policy == GATE
    assert choose(CHOICES, "full") == choose(None) == Choice()
    assert choose(None, "2").policy == choose(CHOICES, "2").policy == Policy(fixed=2)


def test_what_was_not_calibrated_names_the_way_out():
    for given, name, how, said in (
        (None, "gate", {}, "crt calibrate RUN"),
        (CHOICES, "margin", {}, "take gate"),
        (CHOICES, "patience", {}, ", ".join(CRITERIA)),
        (CHOICES, None, {"budget": 0.01}, "--budget 1"),
        (None, None, {"budget": 0.005}, "not calibrated"),
        (CHOICES, "margin", {}, "no cheaper than a fixed exit"),
        (CHOICES, "similarity", {}, "may lose 0.60% of the perplexity, more than 0.50%"),
        (CHOICES, "1", {"budget": 0.005}, "exit 1 may lose 7.25%.*leave out --budget"),
        (CHOICES, "2", {"budget": 0.005}, "exit 2 was not tried.*take gate.*leave out --budget"),
    ):
        with pytest.raises(InputError, match=said):
            choose(given, name, **how)


def test_drafts_are_of_the_fastest_speculation():
    assert drafts(CHOICES) == 2  # of full depth, not of the text of exit 3
    assert drafts(CHOICES, 3) == 0
    with pytest.raises(InputError, match="no drafts of exit 1"):
        drafts(CHOICES, 1)
    for without in (None, Choices(0.005, {"full": Choice()})):
        with pytest.raises(InputError, match="crt calibrate RUN"):
            drafts(without)


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("0.5%", 0.5), ("0", 0.0)])
def test_a_percentage_may_have_its_sign(text, value):
    assert percent(text) == value


@pytest.mark.parametrize("text", ["", "%", "x", "nan", "-1", "1e999", "5%%"])
def test_what_is_no_percentage_is_refused(text):
    with pytest.raises(typer.BadParameter):
        percent(text)


def test_what_is_said_names_the_way_its_promise_and_its_speed():
    said = {name: CHOICES.said(way) for name, way in CHOICES.ways.items()}
    assert said["3"].startswith("exit 3: within +0.50% PPL, 1.20x")
    assert said["speculation from 2"].startswith("speculation from 2: the text of full depth, 1.4")
