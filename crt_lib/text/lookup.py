"""A language of known difficulty: a random permutation as a table, then questions of 1 to K steps.

A line, for the permutation of `ITEMS` letters that it draws:

    line      -> ITEMS pairs, QUESTIONS questions, line end
    pair      -> "c:" "e"          c is sent to e; the pairs stand in a random order
    question  -> "3" "c" "a"       c sent three times through the table is a

The answers follow from the rest, so the entropy is known exactly; and so is the number of
sequential look-ups that an answer needs. Later in a line an earlier answer can save some, and the
same question may come again: only the first question needs as many as it says. A model learns
from the repeated ones first to find and copy what it is asked for.
"""

import math

import numpy as np

ITEMS = 6
QUESTIONS = 24
STEPS = 4  # at most, unless the corpus' name says another number
LETTERS = [chr(ord("a") + i) for i in range(ITEMS)]
WORDS = 1 + 2 * ITEMS  # that the language has, the numbers of steps apart
TABLE = 2 * ITEMS  # words of the table
LENGTH = TABLE + 3 * QUESTIONS + 1  # words of a line, its end included


def sample(n_lines: int, seed: int, steps: int = STEPS) -> str:
    """`n_lines` independent lines, questions of 1..`steps` steps; the same for the same seed."""
    rng = np.random.default_rng([seed, steps])
    keys, sent = (rng.random((n_lines, ITEMS)).argsort(1) for _ in range(2))
    asked = rng.integers(1, steps + 1, (n_lines, QUESTIONS))
    at = answer = start = rng.integers(ITEMS, size=(n_lines, QUESTIONS))
    for step in range(1, steps + 1):
        at = np.take_along_axis(sent, at, 1)
        answer = np.where(asked == step, at, answer)
    letters = np.array(LETTERS, dtype=object)
    words = np.empty((n_lines, LENGTH - 1), dtype=object)
    words[:, :TABLE:2] = letters[keys] + ":"
    words[:, 1:TABLE:2] = letters[np.take_along_axis(sent, keys, 1)]
    words[:, TABLE::3], words[:, TABLE + 1 :: 3] = asked.astype(str), letters[start]
    words[:, TABLE + 2 :: 3] = letters[answer]
    return "".join(" ".join(line) + "\n" for line in words)


def entropy_rate(steps: int = STEPS) -> float:
    """Entropy in nats a word, the line end counted as a word.

    H(line) = 2 log(ITEMS!) for the table and its order + QUESTIONS log(steps ITEMS).
    """
    table = 2 * math.lgamma(ITEMS + 1)
    return (table + QUESTIONS * math.log(steps * ITEMS)) / LENGTH


def scored_entropy(steps: int = STEPS) -> float:
    """Entropy in nats of a word that is scored where a line is a row: all but the first.

    Nothing stands before the first word, one of ITEMS letters; no model scores below this.
    """
    return (entropy_rate(steps) * LENGTH - math.log(ITEMS)) / (LENGTH - 1)


def surprisals(steps: int = STEPS) -> np.ndarray:
    """-log p in nats of each word of a line, (LENGTH,): every choice is among equals.

    Keys and what they are sent to are drawn without repetition; answers and the end follow.
    """
    left = np.log(np.arange(ITEMS, 0, -1))
    question = [math.log(steps), math.log(ITEMS), 0.0]
    return np.concatenate([np.repeat(left, 2), np.tile(question, QUESTIONS), [0.0]])


def chance(step: int) -> float:
    """The share of right answers of who looks nothing up, and answers with the letter asked.

    A letter is on a cycle of each length 1..ITEMS with probability 1 / ITEMS, and comes back
    after `step` steps where the length divides it. No other answer is right as often.
    """
    return sum(step % length == 0 for length in range(1, ITEMS + 1)) / ITEMS


def questions(ids: np.ndarray, steps_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the answers of lines stand, and how many steps each needs.

    `ids` (lines, LENGTH) are whole lines; `steps_of` (vocabulary,) the number that an id stands
    for. Returns columns (QUESTIONS,) of the answers, and steps (lines, QUESTIONS).
    """
    columns = np.arange(TABLE + 2, LENGTH - 1, 3)
    return columns, steps_of[ids[:, columns - 2]]
