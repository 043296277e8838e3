"""Tokenizers: GPT-2's BPE, a byte-level BPE trained on the corpus, a closed word vocabulary.

Also the token streams they make of a corpus, kept under `cache_root()`.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tokenizers import decoders, models, pre_tokenizers, trainers

from crt_lib.files import InputError, atomic_path, cache_root, sha256, write_json, write_text
from crt_lib.text.corpus import SPLITS, Corpus, Split, check_hub, released_lines

END_OF_TEXT = "<|endoftext|>"
END_OF_LINE = "<eos>"

_GPT2_VOCAB, _GPT2_END = 50_257, 50_256
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

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (tokens,) int32; no special token is added."""
        parts = list(self._encode_parts(text))
        return np.concatenate([np.empty(0, np.int32), *parts])

    @abstractmethod
    def encode_lines(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Each line's ids, int32, every line encoded by itself."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; raises InputError for an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"token id {bad} is outside 0..{self.vocab_size - 1} ({self.name})")
        return self._decode(ids.tolist())

    @abstractmethod
    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each id stands for."""

    @abstractmethod
    def _encode_parts(self, text: str) -> Iterator[np.ndarray]: ...

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
        end = backend.token_to_id(END_OF_TEXT)
        if end is None:
            raise InputError(f"tokenizer {name!r} has no token {END_OF_TEXT}")
        self.eot_id = end
        self.fingerprint = sha256(backend.to_str().encode())

    def encode_lines(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Each line's ids, int32, every line encoded by itself."""
        return list(self._encode_all(iter(lines)))

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each id stands for: a byte-level token has one character for each."""
        tokens = (self._backend.id_to_token(i) for i in range(self.vocab_size))
        return np.array([len(token or "") for token in tokens])[ids]  # an id may be nobody's

    def save(self, path: str | Path) -> None:
        """Write it to a file of the `tokenizers` library, atomically; `read_bpe` reads it."""
        write_text(Path(path), self._backend.to_str())

    def _encode_parts(self, text: str) -> Iterator[np.ndarray]:
        return self._encode_all(_chunks(text))

    def _encode_all(self, texts: Iterator[str]) -> Iterator[np.ndarray]:
        while group := [text for _, text in zip(range(_AT_ONCE), texts, strict=False)]:
            for encoding in self._backend.encode_batch_fast(group, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=np.int32)

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class Words(Tokenizer):
    """The closed vocabulary of a text's words and the line end, `<eos>` (id 0, also `eot_id`).

    The rest are in order of falling frequency. A text has as many tokens as words in the WikiText
    convention; white space other than line ends is not kept.
    """

    def __init__(self, text: str):
        counts = Counter(text.split())
        if END_OF_LINE in counts:
            raise InputError(
                f"the train split has the word {END_OF_LINE!r}, which tokenizer 'word' keeps for "
                "line ends; choose 'gpt2' or 'bpe:<vocabulary size>'"
            )
        self._words = [END_OF_LINE, *sorted(counts, key=lambda word: (-counts[word], word))]
        self._ids = {word: i for i, word in enumerate(self._words) if i}
        self.name, self.vocab_size, self.eot_id = "word", len(self._words), 0
        self.fingerprint = sha256(json.dumps(self._words).encode())

    def encode_lines(self, lines: Sequence[str]) -> list[np.ndarray]:
        """Each line's ids, int32; raises InputError for a word outside the vocabulary."""
        return [self.encode(line) for line in lines]

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each id stands for; 1 for a line end. White space is not counted."""
        return np.array([1, *(len(word.encode()) for word in self._words[1:])])[ids]

    def _encode_parts(self, text: str) -> Iterator[np.ndarray]:
        ids: list[int] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                ids.append(self.eot_id)
            try:
                ids.extend([self._ids[word] for word in line.split()])
            except KeyError as error:
                raise InputError(
                    f"the word {error.args[0]!r} is not among the {self.vocab_size:,} of the train "
                    "split; choose tokenizer 'gpt2' or 'bpe:<vocabulary size>' for open text"
                ) from None
        yield np.array(ids, dtype=np.int32)

    def _decode(self, ids: list[int]) -> str:
        lines: list[list[str]] = [[]]
        for i in ids:
            if i == self.eot_id:
                lines.append([])
            else:
                lines[-1].append(self._words[i])
        return "\n".join(" ".join(line) for line in lines)


@dataclass(frozen=True)
class TokenSplit:
    """One split's tokens."""

    ids: np.ndarray  # (tokens,) int32: the whole text's, no separators added
    text: Split
    tokenizer: Tokenizer

    @property
    def n_words(self) -> int:
        """Words of the text, line ends included: what word perplexity divides by."""
        return self.text.n_words

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text: what bits per byte divide by."""
        return self.text.n_bytes

    @property
    def text_sha256(self) -> str:
        """Of the UTF-8 text."""
        return self.text.sha256

    @cached_property
    def token_sha256(self) -> str:
        """Of the ids as little-endian int32."""
        return sha256(self.ids.astype("<i4").tobytes())

    @cached_property
    def lines(self) -> list[np.ndarray]:
        """The released protocol's lines (`released_lines`), each encoded by itself and whole."""
        return _stored(
            "lines",
            self.text,
            self.tokenizer,
            lambda: self.tokenizer.encode_lines(released_lines(self.text.text)),
        )


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
                    "text_sha256": split.text_sha256,
                    "token_sha256": split.token_sha256,
                }
                for name, split in ((name, self.split(name)) for name in SPLITS)
            },
        }


def load_tokenizer(name: str, corpus: Corpus) -> Tokenizer:
    """The tokenizer "gpt2", "bpe:<vocabulary size>" or "word".

    The last two are made from the train split alone. GPT-2's files are read from
    `CRT_DATA_ROOT`/gpt2 when that is set, otherwise from the Hugging Face hub.
    Raises InputError for an unknown name, a size outside 257..1,000,000, or files that cannot be
    had.
    """
    if name == "gpt2":
        return _gpt2()
    if name == "word":
        return Words(corpus.train.text)
    match = re.fullmatch(r"bpe:([0-9]+)", name)
    if match and int(match[1]) in _BPE_SIZES:
        return ByteLevelBPE(name, _trained_bpe(int(match[1]), corpus.train))
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
    """Encode every split, or read its token stream where an earlier run has kept it."""

    def encoded(split: Split) -> TokenSplit:
        (ids,) = _stored("stream", split, tokenizer, lambda: [tokenizer.encode(split.text)])
        return TokenSplit(ids, split, tokenizer)

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


def _gpt2() -> Tokenizer:
    root = os.environ.get("CRT_DATA_ROOT")
    folder = Path(root) / "gpt2" if root else None
    paths = []
    for name in ("vocab.json", "merges.txt"):
        path = folder / name if folder else _from_hub(name)
        if not path.is_file():
            raise InputError(
                f"no {path}: tokenizer 'gpt2' needs vocab.json and merges.txt there. Put them "
                "there, unset CRT_DATA_ROOT to fetch them from the Hugging Face hub, or use "
                "tokenizer 'bpe:8192', which is trained on the corpus"
            )
        paths.append(str(path))
    try:
        backend = _byte_level(models.BPE.from_file(*paths))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{' and '.join(paths)} are not a BPE tokenizer: {error}") from error
    backend.add_special_tokens([END_OF_TEXT])
    size, end = backend.get_vocab_size(), backend.token_to_id(END_OF_TEXT)
    if (size, end) != (_GPT2_VOCAB, _GPT2_END):
        raise InputError(
            f"{paths[0]} is not GPT-2's vocabulary: it has {size:,} tokens and {END_OF_TEXT} is "
            f"{end}; GPT-2's has {_GPT2_VOCAB:,} and {_GPT2_END}"
        )
    return ByteLevelBPE("gpt2", backend)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = "openai-community/gpt2"
    wanted = f"tokenizer 'gpt2' ({name} of {repository})"
    advice = (
        "set CRT_DATA_ROOT to a folder that holds gpt2/vocab.json and gpt2/merges.txt, "
        "or use tokenizer 'bpe:8192', which is trained on the corpus"
    )
    try:
        return Path(hf_hub_download(repository, name, local_files_only=True))
    except LocalEntryNotFoundError:
        check_hub(wanted, advice)
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # whatever the library raises, the next step is the same
        raise InputError(f"cannot fetch {wanted}: {error}. Otherwise {advice}") from error


def _trained_bpe(size: int, train: Split) -> tokenizers.Tokenizer:
    key = f"{train.sha256[:32]}-{tokenizers.__version__}"
    path = cache_root() / "tokenizers" / f"bpe-{size}-{key}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["sha256"] == sha256(stored["tokenizer"].encode()):
            return tokenizers.Tokenizer.from_str(stored["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # absent or damaged: trained anew
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_chunks(train.text), trainer)
    serialised = backend.to_str()
    write_json(path, {"tokenizer": serialised, "sha256": sha256(serialised.encode())})
    return backend


def _stored(
    kind: str, text: Split, tokenizer: Tokenizer, build: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """What `build` returns, from the cache where it is there and whole."""
    key = f"{text.sha256[:32]}-{tokenizer.fingerprint[:32]}"
    path = cache_root() / "tokens" / f"{kind}-{key}.safetensors"
    try:
        stored = load(path.read_bytes())
        ids, lengths = stored["ids"], stored["lengths"]
        if bytes(stored["sha256"]) == _digest(ids, lengths):
            return np.split(ids, lengths.cumsum()[:-1]) if len(lengths) else []
    except (OSError, SafetensorError, KeyError):
        pass  # absent or damaged: built anew
    parts = build()
    ids = np.concatenate([np.empty(0, np.int32), *parts])
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    digest = np.frombuffer(_digest(ids, lengths), dtype=np.uint8)
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({"ids": ids, "lengths": lengths, "sha256": digest}))
    return parts


def _digest(ids: np.ndarray, lengths: np.ndarray) -> bytes:
    return bytes.fromhex(sha256(ids.tobytes() + lengths.tobytes()))
