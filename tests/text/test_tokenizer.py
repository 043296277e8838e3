"""Tokenizers: round trips, what they refuse, and token streams that survive a damaged cache."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from crt_lib.data import PaddedLines
from crt_lib.files import InputError, sha256
from crt_lib.text import tokenizer as module
from crt_lib.text.corpus import SPLITS, Corpus, Split, load_corpus
from crt_lib.text.tokenizer import Tokenizer, load_tokenizer, tokenize

needs_data = pytest.mark.skipif(
    not os.environ.get("CRT_DATA_ROOT"), reason="CRT_DATA_ROOT is not set"
)

# runs of white space, contractions and the end of text are where a byte-level BPE could slip
texts = st.text() | st.lists(
    st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2028", "\x1c", "\U0001f600"])
    | st.sampled_from(["a", "the cat", "don't", "é", "12", ".", "<|endoftext|>"])
).map("".join)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus("grammar")


@pytest.fixture(scope="module")
def bpe(corpus: Corpus) -> Tokenizer:
    return load_tokenizer("bpe:300", corpus)


@pytest.fixture(scope="module")
def wikitext() -> Corpus:
    return load_corpus("wikitext-2")


@given(text=texts)
def test_bpe_gives_any_text_back(bpe: Tokenizer, text: str):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert bpe.decode(ids) == text
    assert bpe.eot_id not in ids  # the end of text never stands for text


@given(text=texts, size=st.integers(1, 6))
def test_encoding_by_chunks_changes_no_token(bpe: Tokenizer, text: str, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", size)
        assert "".join(module._chunks(text)) == text
        by_chunks = bpe.encode(text)
    assert by_chunks.tolist() == bpe._backend.encode(text).ids


def test_half_a_surrogate_pair_is_no_text(bpe: Tokenizer):
    with pytest.raises(InputError, match=r"'\\udcff\\udcfe' is not text in UTF-8"):
        bpe.encode("\udcff\udcfe")


@given(lines=st.lists(texts, max_size=5))
def test_lines_are_encoded_one_by_one(bpe: Tokenizer, lines: list[str]):
    encoded = bpe.encode_lines(lines)
    assert [ids.tolist() for ids in encoded] == [bpe.encode(line).tolist() for line in lines]


def test_bpe_is_trained_on_train_alone_and_the_same_every_time(
    corpus: Corpus, monkeypatch, tmp_path
):
    other = Corpus("other", corpus.train, Split("zzz zzz\n"), Split("qqq qqq\n"))
    first = load_tokenizer("bpe:320", corpus)
    monkeypatch.setenv("CRT_CACHE_ROOT", str(tmp_path))
    again = load_tokenizer("bpe:320", other)
    assert first.fingerprint == again.fingerprint
    assert first.vocab_size == 320 and first.eot_id == 0 and first.name == "bpe:320"
    assert load_tokenizer("bpe:320", corpus).fingerprint == first.fingerprint  # from the cache


@pytest.mark.parametrize("name", ["bpe", "bpe:", "bpe:256", "bpe:-5", "bpe:99999999", "gpt3", ""])
def test_an_unknown_tokenizer_lists_the_known_ones(corpus: Corpus, name: str):
    with pytest.raises(InputError, match=r"'gpt2', 'word', or 'bpe:<vocabulary size>' .*257"):
        load_tokenizer(name, corpus)


def test_an_id_outside_the_vocabulary_is_refused(bpe: Tokenizer):
    for bad in (-1, bpe.vocab_size):
        with pytest.raises(InputError, match=rf"token id {bad} is outside 0\.\.299"):
            bpe.decode([1, bad])
    assert bpe.decode([]) == ""


def test_words_are_the_words_of_train_and_the_line_end(corpus: Corpus):
    word = load_tokenizer("word", corpus)
    for split in SPLITS:
        text = corpus.split(split)
        assert len(word.encode(text.text)) == text.n_words
        assert word.decode(word.encode(text.text)) == text.text
    assert word.decode([word.eot_id]) == "\n" and word.eot_id == 0
    assert word.vocab_size == len(set(corpus.train.text.split())) + 1
    assert word.encode(" a  dog \n\n a").tolist() == word.encode("a dog\n\na").tolist()


def test_a_word_outside_the_vocabulary_is_named(corpus: Corpus):
    word = load_tokenizer("word", corpus)
    for text in ("the zebra\n", "the dog <eos>"):
        with pytest.raises(InputError, match=r"'zebra'|'<eos>'"):
            word.encode(text)
    with_end = Split("a <eos> b\n")
    with pytest.raises(InputError, match="keeps for line ends"):
        load_tokenizer("word", Corpus("x", with_end, with_end, with_end))


@pytest.mark.parametrize("name", ["word", "bpe:300"])
def test_token_streams_are_the_text_and_nothing_else(corpus: Corpus, name: str):
    data = tokenize(corpus, load_tokenizer(name, corpus))
    record = data.record()
    for split in SPLITS:
        tokens = data.split(split)
        assert data.tokenizer.decode(tokens.ids) == corpus.split(split).text
        assert record["splits"][split] == {
            "tokens": len(tokens.ids),
            "words": corpus.split(split).n_words,
            "bytes": corpus.split(split).n_bytes,
            "text_sha256": corpus.split(split).sha256,
            "token_sha256": sha256(tokens.ids.tobytes()),
        }
    assert (record["corpus"], record["tokenizer"]) == ("grammar", name)
    with pytest.raises(InputError, match="unknown split"):
        data.split("dev")


def test_kept_streams_are_read_and_equal(corpus: Corpus, bpe: Tokenizer, monkeypatch):
    first = tokenize(corpus, bpe)
    monkeypatch.setattr(bpe, "_encoded", lambda _: pytest.fail("encoded again"))
    assert tokenize(corpus, bpe).record() == first.record()


def test_a_split_without_long_lines_has_no_rows(bpe: Tokenizer):
    short = Split("short\n")
    assert tokenize(Corpus("short", short, short, short), bpe).train.lines == []


def test_gpt2_without_its_files_says_what_to_do(corpus: Corpus, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("CRT_DATA_ROOT", str(tmp_path))
    folder = tmp_path / "gpt2"
    with pytest.raises(InputError, match=r"gpt2/vocab\.json.*CRT_DATA_ROOT.*bpe:8192"):
        load_tokenizer("gpt2", corpus)
    folder.mkdir()
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for vocabulary, says in (('{"a": 0}', "are not the 50,257"), ("{", "cannot read")):
        (folder / "vocab.json").write_text(vocabulary)
        with pytest.raises(InputError, match=says):
            load_tokenizer("gpt2", corpus)


@needs_data
def test_gpt2_is_the_published_tokenizer(wikitext: Corpus):
    gpt2 = load_tokenizer("gpt2", wikitext)
    assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    text = wikitext.valid.text
    ids = gpt2.encode(text)
    assert len(ids) == 258_659
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ["CRT_DATA_ROOT"]) / "gpt2"
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    )
    assert np.array_equal(ids, theirs.backend_tokenizer.encode(text).ids)


@needs_data
def test_wikitext_2_lines_are_mostly_padding_as_released(wikitext: Corpus):
    gpt2 = load_tokenizer("gpt2", wikitext)
    lines = gpt2.encode_lines(module.released_lines(wikitext.train.text))
    assert len(lines) == 16_287
    assert sum(map(len, lines)) == 2_349_918
    assert 0.60 < PaddedLines(lines, 384, 2, 0, gpt2.eot_id).padding_share < 0.64


@needs_data
def test_the_word_vocabulary_of_wikitext_2_covers_every_split(wikitext: Corpus):
    word = load_tokenizer("word", wikitext)
    assert word.vocab_size == 33_278
    assert [len(word.encode(wikitext.split(s).text)) for s in SPLITS] == [
        2_088_628,
        217_646,
        245_569,
    ]
