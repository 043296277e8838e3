"""A language of known difficulty: a random permutation as a table, then questions of 1 to K steps.

A line, for the permutation of `items` letters that it draws:

    line      -> items pairs, QUESTIONS questions, line end
    pair      -> "c:" "e"          c is sent to e; the pairs stand in a random order
    question  -> "3" "c" "a"       c sent three times through the table is a

The answers follow from the rest, so the entropy is known exactly; and so is the number of
sequential look-ups that an answer needs. Later in a line an earlier answer can save some, and the
same question may come again: only the first question needs as many as it says. A model learns
from the repeated ones first to find and copy what it is asked for.
"""

import math

import numpy as np

ITEMS, STEPS = 6, 4  # unless the corpus' name says other numbers
QUESTIONS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = 1 + 2 * ITEMS  # that the language has, the numbers of steps apart
TABLE = 2 * ITEMS  # words of the table


def length(items: int = ITEMS) -> int:
    """Words of a line, its end included."""
    return 2 * items + 3 * QUESTIONS + 1


LENGTH = length()


def sample(n_lines: int, seed: int, steps: int = STEPS, items: int = ITEMS) -> str:
    """`n_lines` independent lines, questions of 1..`steps` steps; the same for the same seed."""
    rng = np.random.default_rng([seed, steps] + [items] * (items != ITEMS))
    keys, sent = (rng.random((n_lines, items)).argsort(1) for _ in range(2))
    asked = rng.integers(1, steps + 1, (n_lines, QUESTIONS))
    at = answer = start = rng.integers(items, size=(n_lines, QUESTIONS))
    for step in range(1, steps + 1):
        at = np.take_along_axis(sent, at, 1)
        answer = np.where(asked == step, at, answer)
    letters, table = np.array(list(LETTERS[:items]), dtype=object), 2 * items
    words = np.empty((n_lines, length(items) - 1), dtype=object)
    words[:, :table:2] = letters[keys] + ":"
    words[:, 1:table:2] = letters[np.take_along_axis(sent, keys, 1)]
    words[:, table::3], words[:, table + 1 :: 3] = asked.astype(str), letters[start]
    words[:, table + 2 :: 3] = letters[answer]
    return "".join(" ".join(line) + "\n" for line in words)


def entropy_rate(steps: int = STEPS, items: int = ITEMS) -> float:
    """Entropy in nats a word, the line end counted as a word.

    H(line) = 2 log(items!) for the table and its order + QUESTIONS log(steps items).
    """
    table = 2 * math.lgamma(items + 1)
    return (table + QUESTIONS * math.log(steps * items)) / length(items)


def scored_entropy(steps: int = STEPS, items: int = ITEMS) -> float:
    """Entropy in nats of a word that is scored where a line is a row: all but the first.

    Nothing stands before the first word, one of `items` letters; no model scores below this.
    """
    words = length(items)
    return (entropy_rate(steps, items) * words - math.log(items)) / (words - 1)


def chance(step: int, items: int = ITEMS) -> float:
    """The share of right answers of who looks nothing up, and answers with the letter asked.

    A letter is on a cycle of each length 1..items with probability 1 / items, and comes back
    after `step` steps where the length divides it. No other answer is right as often.
    """
    return sum(step % cycle == 0 for cycle in range(1, items + 1)) / items


def questions(ids: np.ndarray, steps_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the answers of lines stand, and how many steps each needs.

    `ids` (lines, length) are whole lines; `steps_of` (vocabulary,) the number that an id stands
    for. Returns columns (QUESTIONS,) of the answers, and steps (lines, QUESTIONS).
    """
    columns = np.arange(ids.shape[1] - 3 * QUESTIONS + 1, ids.shape[1] - 1, 3)
    return columns, steps_of[ids[:, columns - 2]]
