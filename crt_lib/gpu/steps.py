"""`crt gpu`, parts memory and steps: what training at Table 1's size takes on this device.

An update is that of `crt train`: forward and backward of all four exits, gradient clipped, AdamW.
MFU counts six FLOPs a multiply-add of the forward pass, nothing twice, and is held against the
fastest matrix product in the update's own precision, measured in the same process.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crt_lib.audit.accounting import parameters_by_part
from crt_lib.config import GPT2Config, ModelConfig, TrainConfig, make_model
from crt_lib.device import DTYPES
from crt_lib.files import InputError
from crt_lib.gpu.parts import Job, Row, Table, Unfinished
from crt_lib.loss import total_loss
from crt_lib.optim import make_optimizers
from crt_lib.runs.machine import limit_memory, matmul_peak, utilisation, wait
from crt_lib.runs.manifest import peak_memory, run_environment
from crt_lib.runs.profiles import load_profile
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import load_tokenizer, tokenize

LIMIT = 6.0  # gigabytes of the card that the paper names
BAR = 0.45  # MFU that is wanted at Table 1's size
WARM_UP, TIMED = 3, 12  # updates of a shape
TEXT = "wikitext-2"  # where it can be had; else random ids, which take as long


@dataclass(frozen=True)
class Shape:
    """How an update is made; `compiled`: the block, with torch.compile."""

    rows: int
    grad_accum: int = 1
    compiled: bool = False
    recomputed: bool = False  # gradient checkpointing
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """In words."""
        times = f" x {self.grad_accum}" if self.grad_accum > 1 else ""
        how = ["compiled"] * self.compiled + ["recomputed"] * self.recomputed
        return ", ".join([f"{self.rows} rows{times}", *how, self.precision])


PAPER = Shape(2, 8, recomputed=True)  # section 3.3
SHAPES = (  # what matters most first: time may end
    Shape(32),
    Shape(32, compiled=True),
    Shape(8),
    PAPER,
    Shape(64),
    Shape(64, compiled=True),
)
TOY_SHAPES = (Shape(2, precision="fp32"), Shape(2, 2, recomputed=True, precision="fp32"))


def run_memory(job: Job) -> None:
    """The paper's batch on a GPU of `LIMIT` GB: a row of steps.csv; raises if it does not fit."""
    if not job.toy:
        limit_memory(LIMIT)
    (row,) = _measure(job, TOY_SHAPES[1:] if job.toy else (PAPER,), f"{LIMIT:g} GB")
    if row["error"]:
        raise RuntimeError(f"the paper's batch does not fit into {LIMIT:g} GB: {row['error']}")


def run_steps(job: Job) -> None:
    """A row of steps.csv for each way of making an update; raises if none of them fits."""
    rows = _measure(job, TOY_SHAPES if job.toy else SHAPES, "none")
    found = [row for row in rows if row["mfu"] is not None]
    if not found:
        raise RuntimeError(rows[0]["error"])
    best = max(found, key=lambda row: row["mfu"])
    bar = "" if job.toy else f"; the bar is {BAR:.0%}"
    print(f"  highest MFU: {best['mfu']:.1%}, {best['shape']}{bar}", flush=True)


def _measure(job: Job, shapes: Sequence[Shape], limit: str) -> list[Row]:
    """The rows of `shapes`, made where steps.csv has none; raises Unfinished without the time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(job.out / "steps.csv", "shape", "memory_limit")
    missing = [shape for shape in shapes if not table.find(shape.name, limit)]
    toy = load_profile("smoke", "paper").model.replace(vocab_size=500)
    model = toy if job.toy else ModelConfig()
    ids, text = _text(model.vocab_size, job.toy) if missing else (np.empty(0, np.int64), "")
    peaks: dict[str, float] = {}
    compiling, late = 0.0, []
    for shape in missing:
        if job.left() < 3 + 1.2 * compiling * shape.compiled:
            late.append(shape.name)
            continue
        if shape.precision not in peaks:
            kind, tries = DTYPES[shape.precision], 1 if job.toy else 10  # clocks take a while
            peaks[shape.precision] = max(matmul_peak(device, kind, 1024) for _ in range(tries))
        _forget(device)
        train = TrainConfig(
            seq_len=32 if job.toy else 384, batch_size=shape.rows, grad_accum=shape.grad_accum
        )
        row: Row = {"shape": shape.name, "memory_limit": limit, "text": text}
        row |= {"rows": shape.rows, "grad_accum": shape.grad_accum, "seq_len": train.seq_len}
        row |= {"compiled": shape.compiled, "recomputed": shape.recomputed}
        row |= {"precision": shape.precision, "device": run_environment()["device"]}
        row |= {"parameters": sum(parameters_by_part(model).values())}
        row |= _time(job, model, shape, train, ids, peaks[shape.precision], device)
        compiling = max(compiling, (row["first_seconds"] or 0.0) * shape.compiled)
        table.put([row])
        told = row["error"] or f"{row['tokens_per_second']:.0f} tokens/s, MFU {row['mfu']:.1%}"
        print(f"  {shape.name}: {told}, {row['memory'] / 1e9:.2f} GB", flush=True)
    if late:
        raise Unfinished(f"no time was left for {'; '.join(late)}")
    return [row for shape in shapes for row in table.find(shape.name, limit)]


def _text(vocab_size: int, toy: bool) -> tuple[np.ndarray, str]:
    """Token ids for the model, and what they are."""
    if not toy:
        try:
            corpus = load_corpus(TEXT)
            return tokenize(corpus, load_tokenizer("gpt2", corpus)).train.ids, TEXT
        except InputError as error:
            print(f"  random ids in place of text: {error}", flush=True)
    return np.random.default_rng(0).integers(vocab_size, size=1 << 20), "random ids"


def _forget(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _time(
    job: Job,
    model: ModelConfig | GPT2Config,
    shape: Shape,
    train: TrainConfig,
    ids: np.ndarray,
    peak: float,
    device: torch.device,
) -> Row:
    """The median update after the first few, and memory; `error` where there is too little."""
    times: list[float] = []
    row: Row = dict.fromkeys(("first_seconds", "seconds", "tokens_per_second", "mfu", "error"))
    try:
        step = _step(model, shape, train, ids, device)
        while len(times) < WARM_UP or (len(times) < WARM_UP + TIMED and job.left() > 2):
            started = time.perf_counter()
            step()
            wait(device.type)
            times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    else:
        timed = times[WARM_UP:] or times[-1:]
        seconds = float(np.median(timed))
        row["first_seconds"], row["seconds"] = times[0], seconds
        row["tokens_per_second"] = train.batch_size * train.grad_accum * train.seq_len / seconds
        row["mfu"] = utilisation(model, train, np.cumsum(timed).tolist(), peak)
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    row |= {"updates": len(times), "matmul_peak": peak}
    return row | {"memory": peak_memory(), "memory_reserved": reserved}


def _step(
    model_config: ModelConfig | GPT2Config,
    shape: Shape,
    train: TrainConfig,
    ids: np.ndarray,
    device: torch.device,
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = make_model(model_config).to(device).train()
    model.gradient_checkpointing = shape.recomputed
    if shape.compiled:
        model.compile_block()
    optimizers = make_optimizers(model, train)
    rng = np.random.default_rng(0)

    def step() -> None:
        for _ in range(train.grad_accum):
            starts = rng.integers(len(ids) - train.seq_len, size=(train.batch_size, 1))
            windows = ids[starts + np.arange(train.seq_len + 1)].astype(np.int64)
            rows = torch.from_numpy(windows).to(device)  # (B, T + 1)
            inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            half = shape.precision != "fp32"
            with torch.autocast(device.type, DTYPES[shape.precision], enabled=half):
                loss = total_loss(model(inputs, targets=targets), train.aux_weight)
            (loss / train.grad_accum).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step
