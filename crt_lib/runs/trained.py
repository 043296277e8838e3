"""What was trained, read again: model, tokenizer and corpus; its gate, and averaged weights."""

from pathlib import Path
from typing import Any

import torch

from crt_lib.checkpoint import RunFolder, load_model, read_state, save_checkpoint
from crt_lib.config import LanguageModel
from crt_lib.exits.gate import GATE_FILE, Gate, fit_gate
from crt_lib.files import InputError, read_rows, sha256
from crt_lib.model import CRT
from crt_lib.runs.profiles import Profile
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import (
    ByteLevelBPE,
    TokenizedCorpus,
    Tokenizer,
    load_tokenizer,
    read_bpe,
    tokenize,
)

TOKENIZER_FILE = "tokenizer.json"  # beside the checkpoints, where it is a BPE


def load_data(profile: Profile) -> TokenizedCorpus:
    """The profile's corpus, tokenized; raises InputError when one of them cannot be had."""
    corpus = load_corpus(profile.corpus)
    return tokenize(corpus, load_tokenizer(profile.tokenizer, corpus))


def keep_tokenizer(tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Write a BPE beside the checkpoint of a model trained with it, so that no corpus is needed."""
    if isinstance(tokenizer, ByteLevelBPE):
        tokenizer.save(checkpoint.with_name(TOKENIZER_FILE))


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a file or named as one, else the best checkpoint of that run.

    Raises InputError for what is no path.
    """
    try:
        path = Path(path)
        named = path.is_file() or path.suffix == ".safetensors"
    except (TypeError, OSError) as error:
        raise InputError(f"{path!r:.60} is not the path of a run or a checkpoint") from error
    return path if named else RunFolder(path).checkpoint("best")


def scores_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The rows of results.csv of the run whose best checkpoint this file is; none of another."""
    out = checkpoint.parent.parent
    table = out / "results.csv"
    return read_rows(table) if find_checkpoint(out) == checkpoint and table.is_file() else []


def load(path: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """`load_trained_model`, without the record: model, in evaluation mode, and tokenizer."""
    return load_trained_model(path)[:2]


def load_trained_model(
    path: str | Path, tokenizer: str | None = None
) -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """The model of a checkpoint on the best device, its tokenizer, its training's record.

    The model has the gate that was fitted to it. The tokenizer is the one named, else the file
    beside the checkpoint, else made from the corpus again. Raises InputError for a checkpoint that
    `crt train` did not make, and when the tokenizer is not the one it was trained with.
    """
    path = find_checkpoint(path)
    trained = read_state(path).get("run")
    if trained is None:
        raise InputError(f"{path} does not say what it was trained on; give one of `crt train`")
    model = load_model(path, "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, CRT):
        model.gate = Gate.load(path.with_name(GATE_FILE), sha256(path.read_bytes()))
    data, file = trained["data"], path.with_name(TOKENIZER_FILE)
    if tokenizer is None and file.is_file():
        chosen: Tokenizer = read_bpe(data["tokenizer"], file)
    else:
        name = data["tokenizer"] if tokenizer is None else tokenizer
        chosen = load_tokenizer(name, load_corpus(data["corpus"]))
    if chosen.fingerprint != data["tokenizer_sha256"]:
        raise InputError(
            f"{path} was trained with tokenizer {data['tokenizer']}, fingerprint "
            f"{data['tokenizer_sha256'][:8]}; {chosen.name} here has "
            f"{chosen.fingerprint[:8]}: give the same corpus and tokenizer"
        )
    return model, chosen, trained


def load_trained(
    path: str | Path, corpus: str | None = None, tokenizer: str | None = None
) -> tuple[LanguageModel, TokenizedCorpus, dict[str, Any]]:
    """As `load_trained_model`, with a tokenized corpus: that of the training, or another one."""
    model, chosen, trained = load_trained_model(path, tokenizer)
    source = trained["data"]["corpus"] if corpus is None else corpus
    return model, tokenize(load_corpus(source), chosen), trained


def as_crt(model: LanguageModel, path: str | Path) -> CRT:
    """`model`, which `path` holds; raises InputError for a baseline, which has no exits."""
    if not isinstance(model, CRT):
        raise InputError(f"{path} holds a {type(model).__name__}; give the run of a CRT")
    return model


def gate_run(path: str | Path, tokens: int = 50_000) -> CRT:
    """Fit an exit gate to a run's checkpoint, on its training text, and keep it beside it.

    Returns the model with its gate. Raises InputError as `load_trained` and `as_crt`.
    """
    path = find_checkpoint(path)
    loaded, data, trained = load_trained(path)
    model = as_crt(loaded, path)
    seq_len = trained["train"]["seq_len"]
    model.gate = fit_gate(model, data.train.ids[:tokens], data.tokenizer.eot_id, seq_len=seq_len)
    model.gate.save(path.with_name(GATE_FILE), sha256(path.read_bytes()))
    return model


def average_run(out: str | Path, last: int = 5) -> Path:
    """Write the mean of the weights of a run's last kept checkpoints beside them; the file's path.

    It often scores better than a training's end (Polyak and Juditsky 1992; Izmailov et al. 2018,
    arXiv:1803.05407). Raises InputError when fewer than `last` were kept.
    """
    folder = RunFolder(out)
    kept = sorted(folder.checkpoint("last").parent.glob("update-*.safetensors"))  # oldest first
    if len(kept) < last:
        raise InputError(
            f"{folder.path} kept {len(kept)} checkpoints, fewer than {last}; "
            "train with --set train.keep_every=<updates>, or average fewer"
        )
    chosen, path = kept[-last:], folder.checkpoint("average")
    mean, *others = map(load_model, chosen)
    sums = {name: value.double() for name, value in mean.state_dict().items()}
    for other in others:
        for name, value in other.state_dict().items():
            sums[name] += value
    mean.load_state_dict({name: value / last for name, value in sums.items()})
    save_checkpoint(path, mean, read_state(chosen[-1]) | {"averaged": [p.name for p in chosen]})
    return path
