"""`crt bench train`: a training step as released against ours, alternating on one machine.

As released: the plain reference model (explicit attention, full logits at four heads), symmetric
convolutions, padded lines, float32, checkpointing. Ours: the fast path on packed windows. Both have
the same parameters, rows and positions, clip the gradient and take an AdamW step.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.audit.reference import reference_loss
from crt_lib.bench.parts import OTHER, PARTS, Clock, part_bounds
from crt_lib.config import ModelConfig
from crt_lib.data import PackedWindows, PaddedLines
from crt_lib.device import DTYPES, choose_precision
from crt_lib.loss import total_loss
from crt_lib.model import CRT
from crt_lib.runs.machine import matmul_peak, measured_on, memory_bandwidth, wait
from crt_lib.runs.manifest import peak_memory
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import load_tokenizer, tokenize

AUX_WEIGHT = 0.3
CASE = ("rows", "seq_len", "case", "device", "isa", "threads")  # what rows of one comparison share

Rows = list[dict[str, Any]]


def bench_training(
    config: ModelConfig,
    corpus: str,
    tokenizer: str,
    batch_size: int,
    seq_len: int,
    steps: int,
    precision: str = "auto",
) -> tuple[Rows, Rows]:
    """A row a side, and a row a part of our step; medians of `steps`, `case` our side's precision.

    A side's row: seconds a step, useful tokens/s, peak memory, MFU. Each side has a process of its
    own, so that its peak memory is its own, and steps while the other waits. Useful tokens are
    those that are no padding: every position of a packed window, and of padded lines the share that
    the train split has. MFU is 6 * multiply-adds a position (forward and backward, nothing
    recomputed) over the fastest matrix product of the side's own precision in its own process.

    A part's row: its seconds and share of the step, its bound (`crt_lib.bench.parts.part_bounds`),
    the share of the bound that it reaches, and its share of all that is lost against the bounds.
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
    found = _alternate(sides, steps, device.type)

    case = {"rows": batch_size, "seq_len": seq_len, "case": precision, **measured_on()}
    useful = {"released": 1 - lines.padding_share, "ours": 1.0}
    rows = [
        case
        | {"side": name, "precision": side_precision}
        | _side(config, batch_size, seq_len, useful[name], found[name])
        for name, (_, _, side_precision, _) in sides.items()
    ]
    ours = found["ours"]
    bounds = part_bounds(config, batch_size, seq_len, ours["peak"], ours["bandwidth"])
    return rows, [case | row for row in part_rows(ours["parts"], bounds)]


def _side(
    config: ModelConfig, batch_size: int, seq_len: int, useful: float, found: dict[str, Any]
) -> dict[str, Any]:
    """What a side's row says of its speed; `useful`: the share of positions that are no padding."""
    seconds, positions = median(found["seconds"]), batch_size * seq_len
    flops = 6 * sum(multiply_adds(config, seq_len).values()) * positions
    return {
        "parameters": sum(parameters_by_part(config).values()),
        "seconds_per_step": seconds,
        "positions_per_second": positions / seconds,
        "useful_share": useful,
        "useful_tokens_per_second": useful * positions / seconds,
        "peak_memory_bytes": found["memory"],
        "mfu": flops / seconds / found["peak"],
        "matmul_peak": found["peak"],
        "bandwidth": found["bandwidth"],
    }


def part_rows(parts: list[dict[str, float]], bounds: dict[str, float]) -> Rows:
    """A row a part of PARTS, from the seconds by part of several steps."""
    seconds = {name: median(step.get(name, 0.0) for step in parts) for name in PARTS}
    lost = {name: max(0.0, seconds[name] - bounds.get(name, 0.0)) for name in PARTS}
    return [
        {
            "part": name,
            "seconds": seconds[name],
            "share": seconds[name] / sum(seconds.values()),
            "bound_seconds": bounds.get(name),
            "of_bound": bounds[name] / seconds[name] if bounds.get(name) else None,
            "share_of_lost": lost[name] / sum(lost.values()),
        }
        for name in PARTS
    ]


def print_bench(rows: Rows, parts: Rows) -> None:
    """The rows of `bench_training` as tables, its two ratios, and where our step loses most."""
    released, ours = rows
    print(
        f"{ours['rows']} x {ours['seq_len']} positions, on {ours['device']}, {ours['isa']}, "
        f"{ours['threads']} threads"
    )
    print(
        f"{'':10}{'precision':>10}{'s/step':>9}{'useful tok/s':>14}{'peak GB':>9}{'MFU':>7}"
        f"{'of GFLOP/s':>12}"
    )
    for row in rows:
        print(
            f"{row['side']:10}{row['precision']:>10}{row['seconds_per_step']:9.2f}"
            f"{row['useful_tokens_per_second']:14.1f}{row['peak_memory_bytes'] / 1e9:9.2f}"
            f"{row['mfu']:7.1%}{row['matmul_peak'] / 1e9:12.0f}"
        )
    speed = ours["useful_tokens_per_second"] / released["useful_tokens_per_second"]
    print(f"useful tokens/s: {speed:.2f}x   ", end="")
    print(f"peak memory: {ours['peak_memory_bytes'] / released['peak_memory_bytes']:.2f}x")
    print(f"\n{'our step':14}{'ms':>9}{'share':>8}{'of its bound':>14}{'of the lost':>13}")
    for row in parts:
        of_bound = f"{row['of_bound']:.0%}" if row["of_bound"] is not None else ""
        print(
            f"{row['part']:14}{row['seconds'] * 1000:9.1f}{row['share']:8.1%}{of_bound:>14}"
            f"{row['share_of_lost']:13.1%}"
        )
    most = max(parts, key=lambda row: row["share_of_lost"])
    print(f"most is lost in {most['part']}: {most['share_of_lost']:.0%} of what the bounds leave")


def keep_others(found: Rows, new: Rows) -> Rows:
    """`new` beside the rows of `found` that are of other cases (CASE), in order of the cases."""
    cases = {tuple(row[key] for key in CASE) for row in new}
    kept = [row for row in found if tuple(row.get(key) for key in CASE) not in cases]
    return sorted(kept + new, key=lambda row: [str(row.get(key)) for key in CASE])


def _alternate(
    sides: dict[str, tuple[Any, ...]], steps: int, device: str
) -> dict[str, dict[str, Any]]:
    """What each side measured: `seconds` and `parts` of each step, and `_worker`'s last words.

    One unmeasured step goes first.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, {}
    for name, arguments in sides.items():
        pipes[name], theirs = context.Pipe()
        workers[name] = context.Process(target=_worker, args=(theirs, device, *arguments))
        workers[name].start()
        theirs.close()
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "parts": []} for name in sides}
    try:
        for step in range(steps + 1):
            for name, pipe in pipes.items():
                pipe.send(step)
                seconds, parts = pipe.recv()
                if step:
                    found[name]["seconds"].append(seconds)
                    found[name]["parts"].append(parts)
        for name, pipe in pipes.items():
            pipe.send(None)
            found[name] |= pipe.recv()
            workers[name].join()  # or its end would disturb the peaks of the next
    except EOFError as error:
        raise RuntimeError("a side of the benchmark ended early; its error is above") from error
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers.values():
            worker.join()
    return found


def _worker(pipe: Connection, device: str, make_step: Callable[..., Any], *arguments: Any) -> None:
    """A step for each number that comes; then the peak memory, and the device's peaks beside it."""
    config, precision, batches = arguments
    step = make_step(device, config, precision)
    with contextlib.suppress(EOFError):
        while (number := pipe.recv()) is not None:
            batch = batches[number]
            started = time.perf_counter()
            parts = step(batch.inputs.to(device), batch.targets.to(device))
            wait(device)
            pipe.send((time.perf_counter() - started, parts))
        last: dict[str, float] = {"memory": peak_memory()}
        last["peak"] = matmul_peak(torch.device(device), DTYPES[precision])
        pipe.send(last | {"bandwidth": memory_bandwidth(torch.device(device))})


def _released_step(device: str, config: ModelConfig, _: str) -> Callable[[Tensor, Tensor], None]:
    model = CRT(config).to(device)
    state = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.01)

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss, _ = reference_loss(
            state, config, inputs, targets, AUX_WEIGHT, training=True, checkpoint=True
        )
        loss.backward()
        _update(model, optimizer)

    return step


def _our_step(
    device: str, config: ModelConfig, precision: str
) -> Callable[[Tensor, Tensor], dict[str, float]]:
    model = CRT(config).to(device).train()
    model.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(
        model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.01, fused=True
    )

    def step(inputs: Tensor, targets: Tensor) -> dict[str, float]:
        clock = Clock(device)
        with clock.watch(model):
            with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
                loss = total_loss(model(inputs, targets=targets), AUX_WEIGHT)
            with clock.backward():
                loss.backward()
        clock.switch("optimiser")
        _update(model, optimizer)
        clock.switch(OTHER)
        return dict(clock.seconds)

    return step


def _update(model: CRT, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
