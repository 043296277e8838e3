"""Some updates of a training in a process of its own: their seconds, and its peak memory."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from crt_lib.config import GPT2Config, LanguageModel, ModelConfig, TrainConfig, make_model
from crt_lib.data import Batch, make_batches
from crt_lib.device import DTYPES, choose_precision
from crt_lib.files import InputError
from crt_lib.loss import total_loss
from crt_lib.optim import exits_of_update, make_optimizers
from crt_lib.runs.machine import machine_memory, wait
from crt_lib.runs.manifest import peak_memory
from crt_lib.runs.profiles import Profile

LONGEST = 60  # updates of a trial, however fast


@dataclass(frozen=True)
class Trial:
    """Medians in seconds: of a micro-batch, of clipping, of the optimizers' steps.

    `evaluation`: seconds a position that is scored, 0 where none was. `exits`: of each measured
    update. `peak_memory` in bytes.
    """

    precision: str
    micro_batch: float
    clipping: float
    optimizer: float
    exits: tuple[tuple[int, ...], ...]
    evaluation: float = 0.0
    peak_memory: int = 0

    def update(self, grad_accum: int) -> float:
        """Seconds of an update of so many micro-batches."""
        return grad_accum * self.micro_batch + self.clipping + self.optimizer


@dataclass(frozen=True)
class RandomBatches:
    """Batches (rows, length) of random ids: what a step costs does not depend on the text."""

    vocab_size: int
    seq_len: int
    batch_size: int

    def batch(self, epoch: int, step: int) -> Batch:
        """As `PackedWindows.batch`."""
        generator = torch.Generator().manual_seed(step)
        shape = (self.batch_size, self.seq_len + 1)
        rows = torch.randint(self.vocab_size, shape, generator=generator)
        return Batch(rows[:, :-1], rows[:, 1:])


def with_vocabulary(profile: Profile) -> Profile:
    """`profile` with its tokenizer's vocabulary size in the model, reading a corpus only for words.

    Raises InputError as `load_tokenizer`, when the tokenizer is made of the corpus's words.
    """
    name = profile.tokenizer
    if name == "gpt2":
        size = 50_257
    elif name.startswith("bpe:") and name[4:].isdigit():
        size = int(name[4:])
    else:
        from crt_lib.text.corpus import load_corpus
        from crt_lib.text.tokenizer import load_tokenizer

        size = load_tokenizer(name, load_corpus(profile.corpus)).vocab_size
    return profile.replace(model=profile.model.replace(vocab_size=size))


def run_trial(
    model: ModelConfig | GPT2Config, train: TrainConfig, seconds: float, threads: int | None = None
) -> Trial:
    """`measure_updates` on random ids in a process of its own, which may have fewer threads.

    Raises InputError where the process needs more memory than the machine has.
    """
    return _apart(functools.partial(_on_random_ids, model, train, seconds), threads)


def run_rehearsal(profile: Profile, seconds: float) -> Trial:
    """The same on the profile's text, with what `crt train` does besides: validate and save.

    `profile.model` has the tokenizer's vocabulary. Raises InputError as `run_trial`.
    """
    return _apart(functools.partial(_rehearse, profile, seconds), None)


def measure_updates(
    model_config: ModelConfig | GPT2Config, config: TrainConfig, batches: Any, seconds: float
) -> tuple[Trial, LanguageModel, list[torch.optim.Optimizer]]:
    """Updates of one micro-batch each for about `seconds`, at least one after one unmeasured.

    Also the model and the optimizers as they are after them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(
        config.precision, device, model_config.d_model, config.optimizer
    ).name
    torch.manual_seed(config.seed)
    model = make_model(model_config).to(device).train()
    model.gradient_checkpointing = config.gradient_checkpointing
    optimizers = make_optimizers(model, config)
    if config.compile:
        model.compile_block()
    drawn: list[tuple[int, ...]] = []
    times: list[list[float]] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < LONGEST and time.perf_counter() - began < seconds):
        step = len(times)
        exits = exits_of_update(model_config.head_loops, step, config)
        batch = batches.batch(0, step % getattr(batches, "steps_per_epoch", step + 1))
        marks = [time.perf_counter()]
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            losses = model(batch.inputs.to(device), exits, targets=batch.targets.to(device))
            loss = total_loss(losses, config.aux_weight)
        loss.backward()
        _mark(marks, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        _mark(marks, device)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _mark(marks, device)
        times.append([b - a for a, b in itertools.pairwise(marks)])
        drawn.append(exits)
        if step == 0:
            began = time.perf_counter()
    micro_batch, clipping, stepping = map(median, zip(*times[1:], strict=True))
    trial = Trial(precision, micro_batch, clipping, stepping, tuple(drawn[1:]))
    return trial, model, optimizers


def _mark(marks: list[float], device: torch.device) -> None:
    wait(device.type)
    marks.append(time.perf_counter())


def _on_random_ids(model: Any, train: TrainConfig, seconds: float) -> Trial:
    batches = RandomBatches(model.vocab_size, train.seq_len, train.batch_size)
    return measure_updates(model, train, batches, seconds)[0]


def _rehearse(profile: Profile, seconds: float) -> Trial:
    import accelerate  # noqa: F401  its memory is the training's

    from crt_lib.checkpoint import save_checkpoint
    from crt_lib.evaluate import evaluate
    from crt_lib.runs.trained import load_data

    data, config = load_data(profile), profile.train
    trial, model, optimizers = measure_updates(
        profile.model, config, make_batches(config, data), seconds
    )
    rows = max(8, config.batch_size)
    scored = min(rows * config.seq_len, config.eval_tokens, len(data.valid.ids))
    started = time.perf_counter()
    evaluate(
        model,
        data.valid,
        data.tokenizer.eot_id,
        seq_len=config.seq_len,
        batch_size=rows,
        max_tokens=scored,
    )
    evaluation = (time.perf_counter() - started) / scored
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last", model, {}, optimizers)
    return dataclasses.replace(trial, evaluation=evaluation)


def _apart(measure: Callable[[], Trial], threads: int | None) -> Trial:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_worker, args=(theirs, measure, threads))
    worker.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = None
    worker.join()
    if found is None:
        raise InputError(f"{_TOO_LARGE}: the trial was killed")
    if isinstance(found, Exception):
        raise found
    return found


def _worker(pipe: Connection, measure: Callable[[], Trial], threads: int | None) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (machine_memory(),) * 2)
    if threads:
        torch.set_num_threads(threads)
    try:
        pipe.send(dataclasses.replace(measure(), peak_memory=peak_memory()))
    except InputError as error:
        pipe.send(InputError(str(error)))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        pipe.send(InputError(_TOO_LARGE))


_TOO_LARGE = (
    "these settings need more memory than there is here; lower train.batch_size or train.seq_len, "
    "set train.gradient_checkpointing=true, or take a smaller model"
)
