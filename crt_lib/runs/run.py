"""A whole run: corpus, tokenizer, training, evaluation, and the tables it leaves in a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from crt_lib.audit.accounting import parameters_by_part
from crt_lib.audit.compare import exit_table
from crt_lib.audit.protocols import evaluate_deployable
from crt_lib.checkpoint import (
    RunFolder,
    load_model,
    read_metrics,
    read_state,
    read_timing,
)
from crt_lib.config import LanguageModel, TrainConfig, config_from_dict
from crt_lib.device import DTYPES
from crt_lib.evaluate import RELEASED_SEQ_LEN, Evaluation, evaluate
from crt_lib.exits.gate import GATE_FILE, Gate, fit_gate
from crt_lib.files import InputError, read_rows, sha256, write_rows
from crt_lib.model import CRT
from crt_lib.runs.machine import matmul_peak, utilisation
from crt_lib.runs.manifest import peak_memory, read_training, record_training, run_environment
from crt_lib.runs.profiles import Profile
from crt_lib.text.corpus import SPLITS, load_corpus
from crt_lib.text.tokenizer import (
    ByteLevelBPE,
    TokenizedCorpus,
    Tokenizer,
    load_tokenizer,
    read_bpe,
    tokenize,
)
from crt_lib.train import train

DEPLOYABLE_SEQ_LEN = 64  # tokens of a window that is scored one at a time
PROTOCOLS = ("honest", "released", "deployable")
TOKENIZER_FILE = "tokenizer.json"  # beside the checkpoints, where it is a BPE


@dataclass(frozen=True)
class Run:
    """A finished run as its folder tells it."""

    out: Path
    manifest: dict[str, Any]  # the manifest's `train` part
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    results: list[dict[str, Any]]  # rows of results.csv, numbers parsed

    def is_of(self, model: Any, train_config: TrainConfig, data: dict[str, Any]) -> bool:
        """Whether it was made with these settings; fields that it has not are at their defaults."""
        return (
            config_from_dict(self.manifest["model"]) == model
            and TrainConfig.from_dict(self.manifest["train"]) == train_config
            and self.manifest["data"] == data
        )

    def load_model(self) -> LanguageModel:
        """The best checkpoint by validation loss; raises InputError when it is not kept here."""
        return load_model(RunFolder(self.out).checkpoint("best"))


def load_data(profile: Profile) -> TokenizedCorpus:
    """The profile's corpus, tokenized; raises InputError when one of them cannot be had."""
    corpus = load_corpus(profile.corpus)
    return tokenize(corpus, load_tokenizer(profile.tokenizer, corpus))


def run_profile(
    profile: Profile,
    out: str | Path,
    *,
    resume: bool = True,
    progress: bool = True,
    tensorboard: bool = False,
) -> Run | Literal["not the main process"] | None:
    """Train `profile` in `out` and evaluate it; a finished part is not done again.

    Writes what `train` writes, results.csv (`evaluate_run`), exits.csv
    (`crt_lib.audit.compare.exit_table`) and the manifest's `train` part, which is begun before the
    training. Returns None when a signal stopped the training, and a word in the processes that only
    helped to train.
    """
    out = Path(out)
    data = load_data(profile)
    config = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    for name in SPLITS:
        if len(data.split(name).ids) <= DEPLOYABLE_SEQ_LEN:
            raise InputError(
                f"split {name} of {profile.corpus} has {len(data.split(name).ids)} tokens, too few "
                f"to score; give more than {DEPLOYABLE_SEQ_LEN}"
            )
    manifest: dict[str, Any] = {
        "profile": profile.name,
        "recipe": profile.recipe,
        "corpus": profile.corpus,
        "tokenizer": profile.tokenizer,
        "model": config.to_dict(),
        "train": profile.train.to_dict(),
        "parameters": sum(parameters_by_part(config).values()),
        "data": data.record(),
        "environment": run_environment(),
    }
    earlier = load_run(out) if resume else None
    if earlier and earlier.is_of(config, profile.train, manifest["data"]):
        return earlier
    result = train(
        config,
        profile.train,
        data,
        out,
        resume=resume,
        progress=progress,
        tensorboard=tensorboard,
        on_start=partial(record_training, out, profile.name, manifest | {"status": "running"}),
    )
    manifest["processes"] = result.processes
    manifest["precision"] = result.precision._asdict()
    seconds = [row["seconds"] for row in read_timing(out)]
    manifest |= {"seconds": seconds[-1], "peak_memory_bytes": peak_memory()}
    if not result.is_main:
        return "not the main process"
    if not result.finished:
        record_training(out, profile.name, manifest | {"status": "stopped"})
        return None
    path = RunFolder(out).checkpoint("best")
    if isinstance(data.tokenizer, ByteLevelBPE):
        data.tokenizer.save(path.with_name(TOKENIZER_FILE))
    best = load_model(path, next(result.model.parameters()).device)
    device = next(best.parameters()).device
    manifest["matmul_peak"] = matmul_peak(device, DTYPES[result.precision.name], 1024)
    manifest["mfu"] = utilisation(config, profile.train, seconds, manifest["matmul_peak"])
    lines = profile.released_lines
    write_rows(out / "exits.csv", exit_table(best, data, profile.train.seq_len, lines))
    write_rows(out / "results.csv", evaluate_run(best, profile, data, progress))
    record_training(out, profile.name, manifest | {"status": "done"})
    return load_run(out)


def evaluate_run(
    model: LanguageModel, profile: Profile, data: TokenizedCorpus, progress: bool = False
) -> list[dict[str, Any]]:
    """Rows of results: valid and test, both protocols, every exit; deployable PPL on valid.

    honest: windows of the training's length, one after the other. released: lines of 384 tokens (or
    max_seq_len, if shorter), the first `profile.released_lines`; skipped for a text without a line
    over 50 characters. deployable: a sample of valid.
    """
    eot, seq_len = data.tokenizer.eot_id, profile.train.seq_len
    line_len = min(RELEASED_SEQ_LEN, model.config.max_seq_len)
    jobs: list[tuple[str, int, Callable[[], Evaluation]]] = []
    for name in ("valid", "test"):
        split = data.split(name)
        honest = partial(evaluate, model, split, eot, seq_len=seq_len)
        jobs.append((name, seq_len, honest))
        if split.lines:
            released = partial(
                evaluate,
                model,
                split,
                eot,
                protocol="released",
                seq_len=line_len,
                max_lines=profile.released_lines,
            )
            jobs.append((name, line_len, released))
    sample = min(DEPLOYABLE_SEQ_LEN, seq_len)
    deployable = partial(evaluate_deployable, model, data.valid.ids, eot, seq_len=sample)
    jobs.append(("valid", sample, deployable))

    rows = []
    for split_name, length, job in tqdm(jobs, desc="evaluating", disable=not progress):
        labels = {"profile": profile.name, "corpus": profile.corpus, "split": split_name}
        rows += job().rows(**labels, seq_len=length)
    return rows


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a file or named as one, else the best checkpoint of that run."""
    path = Path(path)
    named = path.is_file() or path.suffix == ".safetensors"
    return path if named else RunFolder(path).checkpoint("best")


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
    """Rows of results for a checkpoint, on the corpus it was trained on or another one.

    `protocol`: honest, released or deployable; `seq_len` defaults to the training's length (384 for
    released). Raises InputError when the tokenizer is not the one the model was trained with.
    """
    path = find_checkpoint(path)
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    if stride is not None and protocol != "honest":
        raise InputError(f"stride is for the honest protocol; {protocol} has none")
    model, data, trained = load_trained(path, corpus, tokenizer)
    part, eot = data.split(split), data.tokenizer.eot_id
    length = seq_len or trained["train"]["seq_len"]
    if protocol == "deployable":
        length = seq_len or min(DEPLOYABLE_SEQ_LEN, length)
        result = evaluate_deployable(model, part.ids, eot, seq_len=length)
    elif protocol == "released":
        length = seq_len or min(RELEASED_SEQ_LEN, model.config.max_seq_len)
        result = evaluate(model, part, eot, protocol="released", seq_len=length)
    else:
        result = evaluate(model, part, eot, seq_len=length, stride=stride)
    return result.rows(corpus=data.corpus.name, split=split, seq_len=length)


def load(path: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """The model of a run's folder, or of a checkpoint, in evaluation mode, and its tokenizer.

    Raises InputError as `load_trained_model`.
    """
    model, tokenizer, _ = load_trained_model(path)
    return model.eval(), tokenizer


def load_trained_model(path: str | Path) -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """The model of a checkpoint on the best device, its tokenizer, its training's record.

    The tokenizer is the file beside the checkpoint, else it is made from the corpus again. Raises
    InputError for a checkpoint that `crt train` did not make, and when the tokenizer is not the one
    it was trained with.
    """
    path = find_checkpoint(path)
    trained = _record(path)
    return _model(path), _own_tokenizer(path, trained), trained


def load_trained(
    path: str | Path, corpus: str | None = None, tokenizer: str | None = None
) -> tuple[LanguageModel, TokenizedCorpus, dict[str, Any]]:
    """The model of a checkpoint on the best device, a tokenized corpus, its training's record.

    The corpus is the one it was trained on, or another one. Raises InputError as
    `load_trained_model`.
    """
    path = find_checkpoint(path)
    trained = _record(path)
    source = load_corpus(corpus or trained["data"]["corpus"])
    if tokenizer is None:
        chosen = _own_tokenizer(path, trained)
    else:
        made_on = trained["data"]["corpus"]
        made_on = source if source.name == made_on else load_corpus(made_on)
        chosen = _checked(path, load_tokenizer(tokenizer, made_on), trained)
    return _model(path), tokenize(source, chosen), trained


def as_crt(model: LanguageModel, path: str | Path) -> CRT:
    """`model`, which `path` holds; raises InputError for a baseline, which has no exits."""
    if not isinstance(model, CRT):
        raise InputError(f"{path} holds a {type(model).__name__}; give the run of a CRT")
    return model


def _record(path: Path) -> dict[str, Any]:
    trained = read_state(path).get("run")
    if trained is None:
        raise InputError(f"{path} does not say what it was trained on; give one of `crt train`")
    return trained


def _model(path: Path) -> LanguageModel:
    """With the gate beside it, if one was fitted to this checkpoint."""
    model = load_model(path, "cuda" if torch.cuda.is_available() else "cpu")
    file = path.with_name(GATE_FILE)
    if file.is_file() and isinstance(model, CRT):
        model.gate = Gate.load(file, sha256(path.read_bytes()))
    return model


def gate_run(path: str | Path, tokens: int = 50_000) -> CRT:
    """Fit an exit gate to a run's checkpoint, on its training text, and keep it beside it.

    Returns the model with its gate. Raises InputError as `load_trained` and `as_crt`.
    """
    path = find_checkpoint(path)
    loaded, data, trained = load_trained(path)
    model = as_crt(loaded, path)
    seq_len = trained["train"]["seq_len"]
    ids = data.train.ids[:tokens]
    gate = model.gate = fit_gate(model, ids, data.tokenizer.eot_id, seq_len=seq_len)
    gate.save(path.with_name(GATE_FILE), sha256(path.read_bytes()))
    return model


def _own_tokenizer(path: Path, trained: dict[str, Any]) -> Tokenizer:
    name, file = trained["data"]["tokenizer"], path.with_name(TOKENIZER_FILE)
    if file.is_file():
        return _checked(path, read_bpe(name, file), trained)
    return _checked(path, load_tokenizer(name, load_corpus(trained["data"]["corpus"])), trained)


def _checked(path: Path, tokenizer: Tokenizer, trained: dict[str, Any]) -> Tokenizer:
    if tokenizer.fingerprint != trained["data"]["tokenizer_sha256"]:
        raise InputError(
            f"{path} was trained with tokenizer {trained['data']['tokenizer']}, fingerprint "
            f"{trained['data']['tokenizer_sha256'][:8]}; {tokenizer.name} here has "
            f"{tokenizer.fingerprint[:8]}: give the same corpus and tokenizer"
        )
    return tokenizer


def load_run(out: str | Path) -> Run | None:
    """The finished run in `out`, or None when there is none."""
    out = Path(out)
    part = read_training(out)
    if part is None or part["status"] != "done" or not (out / "results.csv").is_file():
        return None
    return Run(out, part, read_metrics(out), read_timing(out), read_rows(out / "results.csv"))
