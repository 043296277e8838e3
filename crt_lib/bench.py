"""`crt bench train`: a training step as released against ours, alternating on one machine.

As released: the plain reference model (explicit attention, full logits at four heads), symmetric
convolutions, padded lines, float32, checkpointing. Ours: the fast path on packed windows. Both have
the same parameters, rows and positions, clip the gradient and take an AdamW step.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from crt_lib.accounting import multiply_adds, parameters_by_part
from crt_lib.batches import PackedWindows, PaddedLines
from crt_lib.config import ModelConfig
from crt_lib.corpus import load_corpus
from crt_lib.device import DTYPES, choose_precision, matmul_peak, wait
from crt_lib.manifest import peak_memory, run_environment
from crt_lib.model import CRT, total_loss
from crt_lib.reference import reference_loss
from crt_lib.tokenizer import load_tokenizer, tokenize

AUX_WEIGHT = 0.3


def bench_training(
    config: ModelConfig,
    corpus: str,
    tokenizer: str,
    batch_size: int,
    seq_len: int,
    steps: int,
    precision: str = "auto",
) -> list[dict[str, Any]]:
    """A row a side: seconds a step (the median of `steps`), useful tokens/s, peak memory, MFU.

    Each side has a process of its own, so that its peak memory is its own, and steps while the
    other waits. Useful tokens are those that are no padding: every position of a packed window, and
    of padded lines the share that the train split has. MFU is 6 * multiply-adds a position (forward
    and backward, nothing recomputed) over the fastest float32 matrix product measured here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = load_corpus(corpus)
    data = tokenize(source, load_tokenizer(tokenizer, source))
    config = config.replace(vocab_size=data.tokenizer.vocab_size)
    precision = choose_precision(precision, device, config.d_model).name
    lines = PaddedLines(data.train.lines, seq_len, batch_size, 0, data.tokenizer.eot_id)
    windows = PackedWindows(data.train.ids, seq_len, batch_size, 0, data.tokenizer.eot_id)
    released = [lines.batch(0, i) for i in range(steps + 1)]
    packed = [windows.batch(0, i) for i in range(steps + 1)]
    sides = {
        "released": (_released_step, config.replace(causal=False), "fp32", released),
        "ours": (_our_step, config, precision, packed),
    }
    peaks = {name: matmul_peak(device, dtype) for name, dtype in DTYPES.items() if name != "fp16"}
    seconds, memory = _alternate(sides, steps, device.type)

    flops = 6 * sum(multiply_adds(config, seq_len).values()) * batch_size * seq_len
    useful = {"released": 1 - lines.padding_share, "ours": 1.0}
    environment = run_environment()
    rows = []
    for name, (_, _, side_precision, _) in sides.items():
        median = sorted(seconds[name])[len(seconds[name]) // 2]
        rows.append(
            {
                "side": name,
                "precision": side_precision,
                "rows": batch_size,
                "seq_len": seq_len,
                "parameters": sum(parameters_by_part(config).values()),
                "seconds_per_step": median,
                "positions_per_second": batch_size * seq_len / median,
                "useful_share": useful[name],
                "useful_tokens_per_second": useful[name] * batch_size * seq_len / median,
                "peak_memory_bytes": memory[name],
                "mfu": flops / median / peaks["fp32"],
                "matmul_peak_fp32": peaks["fp32"],
                "matmul_peak_bf16": peaks["bf16"],
                "device": environment["device"],
                "threads": environment["torch_threads"],
            }
        )
    return rows


def print_bench(rows: list[dict[str, Any]]) -> None:
    """The rows of `bench_training` as a table, and the two ratios it is run for."""
    released, ours = rows
    print(f"{released['rows']} x {released['seq_len']} positions, on {released['device']}")
    print(
        f"fastest matrix product: {released['matmul_peak_fp32'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{released['matmul_peak_bf16'] / 1e9:.0f} in bf16"
    )
    print(f"{'':10}{'precision':>10}{'s/step':>9}{'useful tok/s':>14}{'peak GB':>9}{'MFU':>7}")
    for row in rows:
        print(
            f"{row['side']:10}{row['precision']:>10}{row['seconds_per_step']:9.2f}"
            f"{row['useful_tokens_per_second']:14.1f}{row['peak_memory_bytes'] / 1e9:9.2f}"
            f"{row['mfu']:7.1%}"
        )
    speed = ours["useful_tokens_per_second"] / released["useful_tokens_per_second"]
    print(f"useful tokens/s: {speed:.2f}x   ", end="")
    print(f"peak memory: {ours['peak_memory_bytes'] / released['peak_memory_bytes']:.2f}x")


def _alternate(
    sides: dict[str, tuple], steps: int, device: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each measured step, and peak bytes, by side; one unmeasured step goes first."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, {}
    for name, arguments in sides.items():
        pipes[name], theirs = context.Pipe()
        workers[name] = context.Process(target=_worker, args=(theirs, device, *arguments))
        workers[name].start()
        theirs.close()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory = {}
    try:
        for step in range(steps + 1):
            for name, pipe in pipes.items():
                pipe.send(step)
                elapsed, memory[name] = pipe.recv()
                if step:
                    seconds[name].append(elapsed)
    except EOFError as error:
        raise RuntimeError("a side of the benchmark ended early; its error is above") from error
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers.values():
            worker.join()
    return seconds, memory


def _worker(pipe: Connection, device: str, make_step: Callable, *arguments: Any) -> None:
    *settings, batches = arguments
    step = make_step(device, *settings)
    while True:
        try:
            batch = batches[pipe.recv()]
        except EOFError:
            return
        started = time.perf_counter()
        step(batch.inputs.to(device), batch.targets.to(device))
        wait(device)
        pipe.send((time.perf_counter() - started, peak_memory()))


def _released_step(device: str, config: ModelConfig, _: str) -> Callable[[Tensor, Tensor], None]:
    model = CRT(config).to(device)
    state = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.01)

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss, _ = reference_loss(
            state, config, inputs, targets, AUX_WEIGHT, training=True, checkpoint=True
        )
        _update(loss, model, optimizer)

    return step


def _our_step(device: str, config: ModelConfig, precision: str) -> Callable[[Tensor, Tensor], None]:
    model = CRT(config).to(device).train()
    model.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(
        model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.01, fused=True
    )

    def step(inputs: Tensor, targets: Tensor) -> None:
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            loss = total_loss(model(inputs, targets=targets), AUX_WEIGHT)
        _update(loss, model, optimizer)

    return step


def _update(loss: Tensor, model: CRT, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
