"""The language of look-ups: answers follow from tables; its entropy and chance are exact."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from crt_lib.files import InputError
from crt_lib.text import lookup
from crt_lib.text.corpus import load_corpus


def read(line: str) -> tuple[dict[str, str], list[tuple[int, str, str]]]:
    """The table and the questions of a line, read word by word."""
    words = line.split()
    n = len(words) - 3 * lookup.QUESTIONS
    table = {key[:-1]: value for key, value in zip(words[0:n:2], words[1:n:2], strict=True)}
    asked = [(int(words[i]), words[i + 1], words[i + 2]) for i in range(n, len(words), 3)]
    return table, asked


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(2, 26))
@settings(max_examples=25, deadline=None)
def test_every_answer_follows_from_the_table(seed, steps, items):
    text = lookup.sample(4, seed, steps, items)
    assert text == lookup.sample(4, seed, steps, items)
    for line in text.splitlines():
        assert len(line.split()) == lookup.length(items) - 1
        table, asked = read(line)
        assert sorted(table) == sorted(table.values()) == list(lookup.LETTERS[:items])
        assert len(asked) == lookup.QUESTIONS
        for step, at, answer in asked:
            assert 1 <= step <= steps
            for _ in range(step):
                at = table[at]
            assert at == answer


def test_what_is_drawn_is_drawn_evenly():
    lines = [read(line) for line in lookup.sample(4_000, 0).splitlines()]
    asked = [question for _, questions in lines for question in questions]
    for values, n in (
        ([step for step, _, _ in asked], lookup.STEPS),
        ([letter for _, letter, _ in asked], lookup.ITEMS),
        ([table["a"] for table, _ in lines], lookup.ITEMS),
        ([next(iter(table)) for table, _ in lines], lookup.ITEMS),
    ):
        counts = np.unique(values, return_counts=True)[1]
        assert len(counts) == n
        expected = len(values) / n
        assert (abs(counts - expected) < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 8])
def test_chance_is_how_often_a_letter_comes_back(step):
    lines = [read(line)[0] for line in lookup.sample(4_000, 1).splitlines()]
    back = []
    for table in lines:
        at = "a"
        for _ in range(step):
            at = table[at]
        back.append(at == "a")
    p = lookup.chance(step)
    assert abs(np.mean(back) - p) < 5 * math.sqrt(p * (1 - p) / len(back))


@pytest.mark.parametrize(
    ("name", "steps", "items"),
    [("lookup", lookup.STEPS, lookup.ITEMS), ("lookup:2", 2, lookup.ITEMS), ("lookup:3x10", 3, 10)],
)
def test_the_corpus_states_its_entropy(name, steps, items, monkeypatch):
    sizes = {"train": (30, 1), "valid": (10, 2), "test": (10, 3)}
    monkeypatch.setattr("crt_lib.text.corpus._LOOKUP_SPLITS", sizes)
    corpus = load_corpus(name)
    assert corpus.entropy == lookup.entropy_rate(steps, items)
    assert corpus.provenance["steps"] == steps
    documents = corpus.documents("test")
    assert len(documents) == 10 and "".join(documents) == corpus.test.text
    by_hand = sum(math.log(left) for left in range(1, items + 1)) * 2
    by_hand += lookup.QUESTIONS * (math.log(steps) + math.log(items))
    words = lookup.length(items)
    assert math.isclose(corpus.entropy * words, by_hand)
    after_first = by_hand - math.log(items)
    assert math.isclose(lookup.scored_entropy(steps, items) * (words - 1), after_first)


@pytest.mark.parametrize(
    "name", ["lookup:0", "lookup:10", "lookup:", "lookup:x", "lookup:4x1", "lookup:4x27"]
)
def test_other_numbers_of_steps_are_refused(name):
    with pytest.raises(InputError, match=f"'{name}'"):
        load_corpus(name)


def test_questions_are_found_in_ids():
    letters = lookup.LETTERS[: lookup.ITEMS]
    words = ["\n", *(f"{letter}:" for letter in letters), *letters, *"1234"]
    ids = np.array(
        [
            [words.index(w) for w in [*line.split(), "\n"]]
            for line in lookup.sample(5, 2).split("\n")[:-1]
        ]
    )
    steps_of = np.array([int(word) if word.isdigit() else 0 for word in words])
    columns, steps = lookup.questions(ids, steps_of)
    for row, line in zip(range(5), lookup.sample(5, 2).splitlines(), strict=True):
        asked = read(line)[1]
        assert steps[row].tolist() == [step for step, _, _ in asked]
        assert [words[i] for i in ids[row, columns]] == [answer for _, _, answer in asked]
