"""The scores of a trained model: rows by split, protocol and exit, and their tables."""

from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crt_lib.audit.compare import exit_table
from crt_lib.audit.protocols import evaluate_deployable
from crt_lib.config import LanguageModel
from crt_lib.evaluate import RELEASED_SEQ_LEN, evaluate
from crt_lib.files import InputError, read_rows, write_rows
from crt_lib.runs.profiles import Profile
from crt_lib.runs.trained import load_trained
from crt_lib.text.tokenizer import TokenizedCorpus

DEPLOYABLE_SEQ_LEN = 64  # tokens of a window that is scored one at a time
PROTOCOLS = ("honest", "released", "deployable")


def check_scorable(data: TokenizedCorpus) -> None:
    """Raise InputError for a split with too few tokens for a window of any protocol."""
    for name in ("train", "valid", "test"):
        if (tokens := len(data.split(name).ids)) <= DEPLOYABLE_SEQ_LEN:
            raise InputError(
                f"split {name} of {data.corpus.name} has {tokens} tokens, too few "
                f"to score; give more than {DEPLOYABLE_SEQ_LEN}"
            )


def write_scores(
    model: LanguageModel, profile: Profile, data: TokenizedCorpus, out: Path, progress: bool
) -> None:
    """Write exits.csv, the rows of `exit_table`, and results.csv.

    Rows of results are of valid and test, under both protocols, at every exit, and of the
    deployable protocol on valid. released: the first `profile.released_lines`; skipped for a text
    without a line over 50 characters.
    """
    seq_len, lines = profile.train.seq_len, profile.released_lines
    write_rows(out / "exits.csv", exit_table(model, data, seq_len, lines))
    asked = [*product(("valid", "test"), ("honest", "released")), ("valid", "deployable")]
    asked = [(name, how) for name, how in asked if how != "released" or data.split(name).lines]
    rows = []
    for name, how in tqdm(asked, "evaluating", disable=None if progress else True):
        found = score(model, data, name, how, seq_len, max_lines=lines)
        rows += [{"profile": profile.name, "corpus": profile.corpus} | row for row in found]
    write_rows(out / "results.csv", rows)


def evaluate_checkpoint(
    path: str | Path,
    corpus: str | None = None,
    tokenizer: str | None = None,
    split: str = "test",
    *,
    protocol: str = "honest",
    seq_len: int | None = None,
    stride: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of `score` for a checkpoint, on the corpus it was trained on or another one.

    Raises InputError when the tokenizer is not the one the model was trained with.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    if stride is not None and protocol != "honest":
        raise InputError(f"stride is for the honest protocol; {protocol} has none")
    model, data, trained = load_trained(path, corpus, tokenizer)
    return score(model, data, split, protocol, trained["train"]["seq_len"], seq_len, stride=stride)


def score(
    model: LanguageModel,
    data: TokenizedCorpus,
    split: str,
    protocol: str,
    trained_len: int,
    seq_len: int | None = None,
    *,
    stride: int | None = None,
    max_lines: int | None = None,
) -> list[dict[str, Any]]:
    """A row an exit of one split under one of PROTOCOLS, with `corpus`, `split` and `seq_len`.

    `seq_len`: positions a window or line; by default the training's length, `trained_len`, 384 for
    released (or max_seq_len, if shorter), and for deployable at most 64.
    """
    part, eot = data.split(split), data.tokenizer.eot_id
    if protocol == "deployable":
        length = seq_len or min(DEPLOYABLE_SEQ_LEN, trained_len)
        result = evaluate_deployable(model, part.ids, eot, seq_len=length)
    else:
        released = min(RELEASED_SEQ_LEN, model.config.max_seq_len)
        length = seq_len or (released if protocol == "released" else trained_len)
        how: Any = {"protocol": protocol, "stride": stride, "max_lines": max_lines}
        result = evaluate(model, part, eot, seq_len=length, **how)
    return result.rows(corpus=data.corpus.name, split=split, seq_len=length)


def results_table(path: Path) -> str:
    """The rows of a results.csv as aligned text, numbers to four digits."""
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path} has no rows; restore it, or remove it and train again")
    cells = [
        [f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        for row in rows
    ]
    columns = zip(*[list(rows[0]), *cells], strict=True)
    padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join(map("  ".join, zip(*padded, strict=True)))
