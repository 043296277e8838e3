"""Tokenizers: GPT-2's BPE, a byte-level BPE trained on the corpus, a closed word vocabulary.

Also the token streams they make of a corpus, kept under `cache_root()`.
"""

import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from crt_lib.files import InputError, sha256, write_text
from crt_lib.text.corpus import SPLITS, Corpus, Split, from_hub, kept, released_lines

END_OF_TEXT = "<|endoftext|>"
END_OF_LINE = "<eos>"

_GPT2_VOCAB = 50_257
_BPE_SIZES = range(257, 1_000_001)  # 256 bytes and the end of text, at least
_CHUNK = 1 << 16  # characters encoded at once
_AT_ONCE = 256  # chunks or lines a call; bounds the memory that their encodings take
_CUT = re.compile(r"[ \n](?=\S)")


class Tokenizer(ABC):
    """Text to token ids and back."""

    name: str  # as `load_tokenizer` takes it
    vocab_size: int
    eot_id: int  # padding of the released protocol, first context of the honest one
    fingerprint: str  # SHA-256 of the serialised tokenizer

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (tokens,) int32; no special token is added."""

    def encode_lines(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Each line's ids, int32, every line encoded by itself."""
        return [self.encode(line) for line in lines]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; raises InputError for an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            raise InputError(
                f"token id {outside[0]} is outside 0..{self.vocab_size - 1} ({self.name})"
            )
        return self._decode(ids.tolist())

    @abstractmethod
    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each id stands for."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class ByteLevelBPE(Tokenizer):
    """A byte-level BPE: decode(encode(text)) == text for any text.

    The text "<|endoftext|>" is encoded as the characters it is made of, so `eot_id` never stands
    for text.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer):
        self.name, self._backend = name, backend
        backend.encode_special_tokens = True
        self.vocab_size = backend.get_vocab_size()
        self.eot_id = backend.get_vocab()[END_OF_TEXT]
        self.fingerprint = sha256(backend.to_str().encode())

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *self._encoded(_chunks(text))])

    def encode_lines(self, lines: Sequence[str]) -> list[np.ndarray]:
        return list(self._encoded(lines))

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each id stands for: a byte-level token has one character for each."""
        tokens = (self._backend.id_to_token(i) for i in range(self.vocab_size))
        return np.array([len(token or "") for token in tokens])[ids]  # an id may be nobody's

    def save(self, path: str | Path) -> None:
        """Write it to a file of the `tokenizers` library, atomically; `read_bpe` reads it."""
        write_text(Path(path), self._backend.to_str())

    def _encoded(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        texts = iter(texts)
        while group := list(itertools.islice(texts, _AT_ONCE)):
            try:
                encodings = self._backend.encode_batch_fast(group, add_special_tokens=False)
            except TypeError:  # half a surrogate pair, as Python reads bytes that are not UTF-8
                for text in group:
                    if text.encode(errors="ignore").decode() != text:
                        said = f"{text[:40]!r} is not text in UTF-8; give it in UTF-8"
                        raise InputError(said) from None
                raise
            for encoding in encodings:
                yield np.array(encoding.ids, dtype=np.int32)

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class Words(Tokenizer):
    """The closed vocabulary of a text's words and the line end, `<eos>` (id 0, also `eot_id`).

    The rest are in order of falling frequency. A text has as many tokens as words in the WikiText
    convention; white space other than line ends is not kept. Raises InputError for a text that has
    `<eos>` as a word.
    """

    def __init__(self, text: str):
        counts = Counter(text.split())
        if END_OF_LINE in counts:
            raise InputError(
                f"the train split has the word {END_OF_LINE!r}, which tokenizer 'word' keeps for "
                "line ends; choose 'gpt2' or 'bpe:<vocabulary size>'"
            )
        words = sorted(counts, key=lambda word: (-counts[word], word))
        self._words = ["\n", *words]
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.name, self.vocab_size, self.eot_id = "word", len(self._words), 0
        self.fingerprint = sha256(json.dumps([END_OF_LINE, *words]).encode())

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (tokens,) int32; raises InputError for a word outside the vocabulary."""
        try:
            return np.array([self._ids[word] for word in re.findall(r"\n|\S+", text)], np.int32)
        except KeyError as error:
            raise InputError(
                f"the word {error.args[0]!r} is not among the {self.vocab_size:,} of the train "
                "split; choose tokenizer 'gpt2' or 'bpe:<vocabulary size>' for open text"
            ) from None

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each id stands for; 1 for a line end. White space is not counted."""
        return np.array([len(word.encode()) for word in self._words])[ids]

    def _decode(self, ids: list[int]) -> str:
        return re.sub(" ?\n ?", "\n", " ".join(self._words[i] for i in ids))


@dataclass(frozen=True)
class TokenSplit(Split):
    """One split's text and its tokens."""

    ids: np.ndarray  # (tokens,) int32: the whole text's, no separators added
    tokenizer: Tokenizer

    @cached_property
    def lines(self) -> list[np.ndarray]:
        """The released protocol's lines (`released_lines`), each encoded by itself and whole."""
        return self.tokenizer.encode_lines(released_lines(self.text))


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus and the token streams of its splits."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenSplit
    valid: TokenSplit
    test: TokenSplit

    def split(self, name: str) -> TokenSplit:
        """The split of that name; raises InputError for an unknown one."""
        self.corpus.split(name)
        return getattr(self, name)

    def record(self) -> dict[str, Any]:
        """Names, hashes and counts, JSON-able: what a manifest keeps of the data."""
        return {
            "corpus": self.corpus.name,
            "provenance": self.corpus.provenance,
            "entropy_nats_per_word": self.corpus.entropy,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "splits": {
                name: {
                    "tokens": len(split.ids),
                    "words": split.n_words,
                    "bytes": split.n_bytes,
                    "text_sha256": split.sha256,
                    "token_sha256": sha256(split.ids.astype("<i4").tobytes()),
                }
                for name, split in zip(SPLITS, map(self.split, SPLITS), strict=True)
            },
        }


def load_tokenizer(name: str, corpus: Corpus) -> Tokenizer:
    """The tokenizer "gpt2", "bpe:<vocabulary size>" or "word".

    The last two are made from the train split alone. GPT-2's files are read from
    `CRT_DATA_ROOT`/gpt2 when that is set, otherwise from the Hugging Face hub.
    Raises InputError for an unknown name, a size outside 257..1,000,000, or files that cannot be
    had.
    """
    if not isinstance(corpus, Corpus):
        raise InputError(f"the corpus is {corpus!r:.60}; give what load_corpus returns")
    if name == "gpt2":
        return _gpt2()
    if name == "word":
        return Words(corpus.train.text)
    match = re.fullmatch(r"bpe:([0-9]+)", str(name))
    if match and int(match[1]) in _BPE_SIZES:
        return _trained_bpe(name, int(match[1]), corpus.train)
    raise InputError(
        f"unknown tokenizer {name!r}; choose 'gpt2', 'word', or 'bpe:<vocabulary size>' with a "
        f"size in {_BPE_SIZES[0]}..{_BPE_SIZES[-1]}"
    )


def read_bpe(name: str, path: str | Path) -> ByteLevelBPE:
    """The tokenizer that `ByteLevelBPE.save` wrote; raises InputError for a file that is none."""
    try:
        return ByteLevelBPE(name, tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is not a tokenizer that can be read: {error}") from error


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> TokenizedCorpus:
    """Encode every split, or read its token stream where an earlier run has kept it.

    Raises InputError for what is no corpus, or no tokenizer.
    """
    if not (isinstance(corpus, Corpus) and isinstance(tokenizer, Tokenizer)):
        given = f"{corpus!r:.60} and {tokenizer!r:.60}"
        raise InputError(f"give what load_corpus and load_tokenizer return, not {given}")

    def encoded(split: Split) -> TokenSplit:
        key = f"{split.sha256[:32]}-{tokenizer.fingerprint[:32]}"
        stored = kept(f"tokens/{key}", lambda: tokenizer.encode(split.text).tobytes())
        return TokenSplit(split.text, np.frombuffer(stored, np.int32), tokenizer)

    return TokenizedCorpus(corpus, tokenizer, *(encoded(corpus.split(name)) for name in SPLITS))


def _chunks(text: str) -> Iterator[str]:
    """Cut `text` where GPT-2's pre-tokenizer cuts it too, whatever stands on either side.

    That is before the last character of white space in front of anything else: the pre-tokenizer
    gives it to what follows, or leaves it alone, and looks no further back.
    """
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHUNK)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2() -> ByteLevelBPE:
    names, root = ("vocab.json", "merges.txt"), os.environ.get("CRT_DATA_ROOT")
    advice = (
        "set CRT_DATA_ROOT to a folder that holds gpt2/vocab.json and gpt2/merges.txt of GPT-2, "
        "or use tokenizer 'bpe:8192', which is trained on the corpus"
    )
    if root:
        paths = [str(Path(root) / "gpt2" / name) for name in names]
    else:
        with from_hub("tokenizer 'gpt2'", advice):
            from huggingface_hub import hf_hub_download, try_to_load_from_cache

            # whose tokens are counted, and whose fingerprint a checkpoint keeps
            files = [("openai-community/gpt2", name) for name in names]
            paths = [try_to_load_from_cache(*f) or hf_hub_download(*f) for f in files]  # nosec B615
    try:
        backend = _byte_level(models.BPE.from_file(*paths))
        backend.add_special_tokens([END_OF_TEXT])
        if (size := backend.get_vocab_size()) != _GPT2_VOCAB:
            raise ValueError(f"{size:,} tokens are not the {_GPT2_VOCAB:,} of GPT-2's vocabulary")
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"cannot read {' and '.join(paths)}: {error}; {advice}") from error
    return ByteLevelBPE("gpt2", backend)


def _trained_bpe(name: str, size: int, train: Split) -> ByteLevelBPE:
    def trained() -> bytes:
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(_chunks(train.text), trainer)
        return backend.to_str().encode()

    key = f"{train.sha256[:32]}-{tokenizers.__version__}"
    stored = kept(f"tokenizers/bpe-{size}-{key}", trained)
    return ByteLevelBPE(name, tokenizers.Tokenizer.from_buffer(stored))
