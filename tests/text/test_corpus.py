"""Corpora: what each one holds, what is refused, and the entropy of the grammar."""

import math
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from closeness import same
from hypothesis import given, strategies as st

from crt_lib.files import InputError
from crt_lib.text import docstrings, grammar
from crt_lib.text.corpus import CORPORA, SPLITS, Corpus, Split, cache_root, kept, load_corpus

DATA_ROOT = os.environ.get("CRT_DATA_ROOT")


@pytest.fixture(scope="module")
def prose() -> Corpus:
    return load_corpus("docstrings")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(f"The {split} text.\nTwo lines.\n\nMore.\n")
    return tmp_path


def test_what_is_kept_is_made_once_and_again_where_it_is_damaged(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CRT_CACHE_ROOT", str(tmp_path))
    data = bytes(range(256))
    assert kept("of/x", lambda: data) == data
    assert kept("of/x", lambda: pytest.fail("made again")) == data
    whole = (tmp_path / "of" / "x").read_bytes()
    for damaged in (b"", whole[:-9], whole[:99], whole.replace(b"ab", b"ba")):
        (tmp_path / "of" / "x").write_bytes(damaged)
        assert kept("of/x", lambda: data) == data
        assert (tmp_path / "of" / "x").read_bytes() == whole


def test_two_that_need_the_same_at_once_make_it_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CRT_CACHE_ROOT", str(tmp_path))
    made = []

    def make() -> bytes:
        made.append(1)
        time.sleep(0.1)
        return b"data"

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: kept("x", make), range(4))) == [b"data"] * 4
    assert made == [1]


# the user's folder


def test_a_folder_is_read_as_it_stands(folder: Path):
    corpus = load_corpus(str(folder))
    assert corpus.train.text == "The train text.\nTwo lines.\n\nMore.\n"
    assert corpus.train.n_words == 6 + 4 and corpus.train.n_bytes == 34
    assert corpus.documents("train") == ["The train text.\nTwo lines.\n\n", "More.\n"]
    assert corpus.entropy is None
    with pytest.raises(InputError, match=r"'dev'.*train, valid, test"):
        corpus.split("dev")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("valid.txt", None, r"No such file .*valid\.txt"),
        ("test.txt", b"caf\xe9\n", r"test\.txt: .* byte 0xe9 in position 3.*iconv"),
        ("train.txt", b"", r"train split .* is empty"),
        ("train.txt", b" \n\n", r"train split .* is empty"),
    ],
)
def test_a_split_that_is_missing_empty_or_not_utf8_is_named(folder: Path, name, data, says):
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=says):
        load_corpus(str(folder))


@pytest.mark.parametrize("name", ["wikitext", "", "/no/such/folder"])
def test_an_unknown_corpus_lists_the_known_ones(name: str):
    with pytest.raises(InputError) as error:
        load_corpus(name)
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in CORPORA)


@given(st.text(alphabet="ab \n\t\r", max_size=60), st.sampled_from(["wikitext-2", "grammar", "x"]))
def test_documents_concatenate_to_the_text(text: str, name: str):
    split = Split(text)
    documents = Corpus(name, split, split, split).documents("test")
    assert "".join(documents) == text
    assert text == "" or all(documents)


# WikiText


def wikitext(root: Path, kind: str = "tokens") -> Path:
    root.mkdir(parents=True)
    for split in SPLITS:
        (root / f"wiki.{split}.{kind}").write_text(
            f" \n = {split.title()} = \n \n One @-@ two . \n \n = = Part = = \n \n"
            " i \n = 10 ° = \n \n = Other = \n \n More . \n",
        )
    return root


@pytest.mark.parametrize("kind", ["tokens", "raw"])
def test_wikitext_from_a_local_folder(tmp_path: Path, monkeypatch, kind: str):
    monkeypatch.setenv("CRT_DATA_ROOT", str(tmp_path))
    wikitext(tmp_path / "wikitext-103", kind)
    corpus = load_corpus("wikitext-103")
    articles = corpus.documents("valid")
    assert [article.split("\n")[1] for article in articles] == [" = Valid = ", " = Other = "]
    assert "".join(articles) == corpus.valid.text
    assert "10 °" in articles[0]  # a formula between equals signs is no heading
    assert corpus.provenance["files"][0] == f"wiki.train.{kind}"


def test_a_data_root_without_the_corpus_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CRT_DATA_ROOT", str(tmp_path))
    with pytest.raises(InputError) as error:
        load_corpus("wikitext-2")
    for part in (str(tmp_path / "wikitext-2"), "unset CRT_DATA_ROOT", "'docstrings'"):
        assert part in str(error.value)
    wikitext(tmp_path / "wikitext-2")
    (tmp_path / "wikitext-2" / "wiki.test.tokens").unlink()
    with pytest.raises(InputError, match=r"wiki\.test\.tokens"):
        load_corpus("wikitext-2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch):
    """A cache of its own, no data root, and what to call with the hub's `load_dataset`."""
    monkeypatch.delenv("CRT_DATA_ROOT", raising=False)
    monkeypatch.setenv("CRT_CACHE_ROOT", str(tmp_path / "cache"))

    def is_hub(load_dataset) -> None:
        fake = types.SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", fake)

    return is_hub


def test_the_hub_is_asked_once_and_its_blank_lines_restored(hub):
    rows = {"text": ["", " = A = \n", "", " words . \n"]}
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {"train": rows, "validation": rows, "test": rows}

    hub(load_dataset)
    first, second = load_corpus("wikitext-2"), load_corpus("wikitext-2")
    assert first.valid.text == " \n = A = \n \n words . \n" == second.valid.text
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]


def test_what_the_hub_raises_becomes_an_input_error(hub, monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("offline mode")

    hub(load_dataset)
    with pytest.raises(InputError) as error:
        load_corpus("wikitext-2")
    said = ("wikitext-2-raw-v1", "offline mode", "CRT_DATA_ROOT", "wiki.train.tokens", "docstrings")
    assert all(part in str(error.value) for part in said)
    assert not [
        path
        for path in cache_root().rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets.*pip install 'crt-lm\[notebooks\]'"):
        load_corpus("wikitext-2")


@pytest.mark.skipif(not DATA_ROOT, reason="CRT_DATA_ROOT is not set")
def test_wikitext_2_has_its_published_counts():
    corpus = load_corpus("wikitext-2")
    assert corpus.train.n_words == 2_088_628
    assert (corpus.valid.n_words, corpus.test.n_words) == (217_646, 245_569)
    assert [len(corpus.documents(split)) for split in SPLITS] == [600, 60, 60]


# docstrings


def test_docstrings_are_enough_and_split_by_module(prose: Corpus):
    words = {split: prose.split(split).n_words for split in SPLITS}
    assert words["train"] > 150_000 and min(words["valid"], words["test"]) > 10_000
    assert set(prose.provenance["packages"]) == {"numpy", "pandas", "matplotlib"}


def test_no_paragraph_is_in_two_splits_or_twice_in_one(prose: Corpus):
    paragraphs = [line for split in SPLITS for line in prose.split(split).text.split("\n") if line]
    assert len(paragraphs) == len(set(paragraphs))


def test_docstrings_read_as_prose(prose: Corpus):
    for split in SPLITS:
        lines = [line for line in prose.split(split).text.split("\n") if line]
        assert all(line[0].isupper() and line[-1] in ".!?" for line in lines)
        text = "\n".join(lines)
        assert not any(mark in text for mark in (">>>", "::", "://", "`", "=", "---", "\t"))
        words = text.lower().split()
        assert sum(word in ("the", "a", "of", "is", "to") for word in words) > 0.15 * len(words)


def test_prose_leaves_out_code_tables_and_lists_of_parameters():
    docstring = """Return the *sum* of `a` along an axis.

    Some words on :func:`~numpy.sum` [1]_ that run over
    two lines of text. See the `user guide <https://x.org>`_ for more.

    .. versionadded:: 1.0
       Words of a directive that are not kept at all.

    .. note::
       It is a note, and the note is kept.

    Parameters
    ----------
    a : array_like
        The elements to sum, all of them.
    axis : {0, 1}

    Notes
    -----
    For example, this is how it is used, with code::

        The code is not a sentence of the text.

    - One item of a list, which is a sentence.
    - x = 1 is the value of the thing.

    === ===
    A   The table is not a text to read.
    === ===

    >>> np.sum([1])
    1
    """
    assert docstrings.prose(docstring) == [
        "Return the sum of a along an axis.",
        "Some words on numpy.sum that run over two lines of text. See the user guide for more.",
        "It is a note, and the note is kept.",
        "The elements to sum, all of them.",
        "One item of a list, which is a sentence.",
    ]


def test_of_a_document_what_none_before_it_had_is_kept():
    documents, seen = [["A b.", "C."], ["a B."], ["D.", "c."]], {"e."}
    text = docstrings.text(documents, lambda paragraph: {paragraph.lower()}, seen)
    assert text == "A b.\nC.\n\nD.\n\n"
    assert seen == {"a b.", "c.", "d.", "e."}
    assert docstrings.text([["E."], ["F g."]], lambda words: set(words.lower().split()), seen) == (
        "F g.\n\n"
    )


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("numpy", "no-such-package"))
    with pytest.raises(InputError, match=r"no-such-package is not installed.*crt-lm\[notebooks\]"):
        load_corpus("docstrings")


# grammar


def test_the_entropy_rate_is_what_a_long_sample_shows():
    sentences = grammar.sample(20_000, seed=11).splitlines(keepends=True)
    nats = np.array([-grammar.log_prob(sentence) for sentence in sentences])
    words = np.array([Split(sentence).n_words for sentence in sentences])
    rate = nats.sum() / words.sum()
    error = np.std(nats - rate * words) / math.sqrt(len(words)) / words.mean()
    assert error < 0.005
    assert abs(rate - grammar.entropy_rate()) < 4 * error


def test_the_transitions_are_distributions_over_known_words():
    matrix = grammar.transitions()
    assert matrix.shape == (len(grammar.words()),) * 2
    same(matrix.sum(1), np.ones(len(matrix)))
    assert len(set(grammar.words())) == len(grammar.words())
    assert set(grammar.sample(3_000, seed=0).split()) == set(grammar.words()[1:])


def test_grammar_corpus_is_the_same_every_time_and_scores_near_its_entropy():
    corpus = load_corpus("grammar")
    assert corpus.train.sha256 == load_corpus("grammar").train.sha256
    assert corpus.entropy == grammar.entropy_rate()
    assert len({corpus.split(split).sha256 for split in SPLITS}) == 3
    assert corpus.train.n_words > 50_000 and corpus.test.n_words > 5_000
    rate = -grammar.log_prob(corpus.test.text) / corpus.test.n_words
    assert rate == pytest.approx(corpus.entropy, abs=0.03)
    assert len(corpus.documents("test")) == corpus.test.text.count("\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("the dog flies\n", "'flies' is not a word"),
        ("the dogs sleep\n", "'dogs' never follows 'the'"),
        ("the dog sleep\n", "'sleep' never follows 'dog'"),
        ("\n", "never follows"),
    ],
)
def test_text_outside_the_language_has_no_probability(text: str, says: str):
    with pytest.raises(InputError, match=says):
        grammar.log_prob(text)
