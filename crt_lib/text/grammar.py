"""A small probabilistic language whose entropy rate is known exactly.

A first-order Markov chain over words: the next word depends on the previous word alone, so a
bigram model is sufficient, and no causal model can score below the entropy rate. A sentence is one
line, and the line end is the word that ends it:

    sentence  -> subject verb-phrase line-end       "these hungry dogs find bread near snow today"
    subject   -> determiner (adjective) noun        all singular or all plural, and so the verb
    verb      -> intransitive | transitive object
    object    -> mass-noun (preposition object)
"""

import functools
import math
import random
import re

import numpy as np

from crt_lib.files import InputError

LINE_END = "\n"

_CLASSES = {
    "end": LINE_END,
    "det_sg": "the a every this",
    "det_pl": "some many these",
    "adj_sg": "little lonely",
    "adj_pl": "hungry noisy",
    "noun_sg": "dog child bird teacher cat",
    "noun_pl": "dogs children birds teachers cats",
    "verb_sg": "finds likes wants sees",
    "verb_pl": "find like want see",
    "intr_sg": "sleeps waits",
    "intr_pl": "sleep wait",
    "object": "water bread music snow paper",
    "prep": "near with without",
    "adverb": "today quietly often here",
}
_WORDS = {name: members.split(" ") for name, members in _CLASSES.items()}
_FOLLOWERS = {
    "end": {"det_sg": 0.6, "det_pl": 0.4},
    "det_sg": {"noun_sg": 0.7, "adj_sg": 0.3},
    "det_pl": {"noun_pl": 0.7, "adj_pl": 0.3},
    "adj_sg": {"noun_sg": 1.0},
    "adj_pl": {"noun_pl": 1.0},
    "noun_sg": {"verb_sg": 0.75, "intr_sg": 0.25},
    "noun_pl": {"verb_pl": 0.75, "intr_pl": 0.25},
    "verb_sg": {"object": 1.0},
    "verb_pl": {"object": 1.0},
    "intr_sg": {"adverb": 0.6, "end": 0.4},
    "intr_pl": {"adverb": 0.6, "end": 0.4},
    "object": {"end": 0.5, "prep": 0.3, "adverb": 0.2},
    "prep": {"object": 1.0},
    "adverb": {"end": 1.0},
}


def words() -> tuple[str, ...]:
    """Every word of the language; the first is the line end."""
    return tuple(word for members in _WORDS.values() for word in members)


@functools.cache
def transitions() -> np.ndarray:
    """(words, words) float64: row i is the distribution of the word after `words()[i]`.

    Inside a class the probabilities are Zipf's, 1 / rank; the i-th word of the class before it
    ranks the i-th member first, so that words of one class differ in what follows them.
    """
    index = {word: i for i, word in enumerate(words())}
    matrix = np.zeros((len(index), len(index)))
    for name, members in _WORDS.items():
        for i, word in enumerate(members):
            for follower, share in _FOLLOWERS[name].items():
                n = len(_WORDS[follower])
                harmonic = sum(1 / rank for rank in range(1, n + 1))
                for j, following in enumerate(_WORDS[follower]):
                    rank = (j - i) % n + 1
                    matrix[index[word], index[following]] = share / (rank * harmonic)
    matrix.setflags(write=False)
    return matrix


def entropy_rate() -> float:
    """Entropy rate in nats a word, the line end counted as a word.

    H = sum over w of pi(w) H(next word | w), with pi the chain's stationary distribution. Sentences
    are independent, so it is also the mean of -log p(sentence) over the mean of their lengths.
    """
    matrix = transitions()
    n = len(matrix)
    equations = np.vstack([matrix.T - np.eye(n), np.ones(n)])  # pi P = pi, sum of pi = 1
    stationary = np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0), rcond=None)[0]
    logs = np.log(np.where(matrix > 0, matrix, 1.0))
    return float(-(stationary @ (matrix * logs).sum(1)))


def sample(n_sentences: int, seed: int) -> str:
    """`n_sentences` independent sentences, one a line; the same text for the same seed."""
    names, rng = words(), random.Random(seed)
    followers = [
        (np.flatnonzero(row).tolist(), row[row > 0].cumsum().tolist()) for row in transitions()
    ]
    lines = []
    for _ in range(n_sentences):
        line: list[str] = []
        state = 0
        while not line or state:
            choices, cumulative = followers[state]
            state = rng.choices(choices, cum_weights=cumulative)[0]
            line.append(names[state])
        lines.append(" ".join(line[:-1]) + LINE_END)
    return "".join(lines)


def surprisals(text: str) -> list[float]:
    """-log p of each word of `text`, which begins at a sentence's start, in nats.

    Raises InputError for a word or a pair of neighbouring words that the language does not have.
    """
    index = {word: i for i, word in enumerate(words())}
    found, before = [], LINE_END
    for word in re.findall(r"[^ \n]+|\n", text):
        if word not in index:
            raise InputError(
                f"{word!r} is not a word of the grammar; it has {', '.join(words()[1:])}"
            )
        probability = transitions()[index[before], index[word]]
        if not probability:
            raise InputError(f"in the grammar {word!r} never follows {before!r}")
        found.append(-math.log(probability))
        before = word
    return found


def log_prob(text: str) -> float:
    """The natural logarithm of the probability of `text`; raises InputError as `surprisals`."""
    return -math.fsum(surprisals(text))
