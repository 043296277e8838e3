"""`crt bench train`: a training step as released against ours, alternating on one machine.

As released: the plain reference model (explicit attention, full logits at four heads), symmetric
convolutions, padded lines, float32, checkpointing. Ours: the fast path on packed windows. Both have
the same parameters, rows and positions, clip the gradient and take an AdamW step.
"""

import contextlib
import functools
from statistics import median
from typing import Any

import torch
from torch import Tensor

from crt_lib.audit.accounting import parameters_by_part
from crt_lib.audit.reference import reference_loss
from crt_lib.bench.parts import PARTS, part_bounds
from crt_lib.bench.trial import Training, ask, best_device, own_process
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.data import Batch, make_batches
from crt_lib.device import DTYPES, choose_precision
from crt_lib.runs.machine import matmul_peak, measured_on, memory_bandwidth, utilisation
from crt_lib.runs.manifest import peak_memory
from crt_lib.text.corpus import load_corpus
from crt_lib.text.tokenizer import load_tokenizer, tokenize

CASE = ("rows", "seq_len", "case", "device", "isa", "threads")  # what rows of one comparison share

Rows = list[dict[str, Any]]
Updates = list[dict[str, float]]  # seconds by part


class Released(Training):
    """A training as released, of the model that `config` says."""

    def __init__(self, model: ModelConfig, config: TrainConfig):
        super().__init__(model, config)
        self.state = dict(self.model.named_parameters())
        rate, decay = config.max_lr, config.weight_decay
        adamw = torch.optim.AdamW(self.state.values(), rate, config.betas, weight_decay=decay)
        self.optimizers = [adamw]  # not fused

    def loss(self, inputs: Tensor, targets: Tensor, exits: tuple[int, ...]) -> Tensor:
        """Eq. 5 through full logits."""
        config, weight = self.model.config, self.config.aux_weight
        return reference_loss(
            self.state, config, inputs, targets, weight, training=True, checkpoint=True
        )[0]


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
    source = load_corpus(corpus)
    data = tokenize(source, load_tokenizer(tokenizer, source))
    config = config.replace(vocab_size=data.tokenizer.vocab_size)
    precision = choose_precision(precision, best_device(), config.d_model).name
    ours = TrainConfig(
        batch_size=batch_size, seq_len=seq_len, gradient_checkpointing=True, precision=precision
    )
    sides = {
        "released": (
            Released,
            config.replace(causal=False),
            ours.replace(batching="padded", precision="fp32"),
        ),
        "ours": (Training, config, ours),
    }
    batches = {name: make_batches(train, data) for name, (_, _, train) in sides.items()}
    found = _alternate(sides, batches, steps)
    case = {"rows": batch_size, "seq_len": seq_len, "case": precision, **measured_on()}
    rows = []
    for name, (_, model, train) in sides.items():
        useful = 1 - getattr(batches[name], "padding_share", 0.0)
        rows.append(case | {"side": name} | _side(model, train, useful, *found[name]))
    updates, ends = found["ours"]
    bounds = part_bounds(config, batch_size, seq_len, ends["matmul_peak"], ends["bandwidth"])
    return rows, [case | row for row in part_rows(updates, bounds)]


def _side(
    model: ModelConfig, train: TrainConfig, useful: float, updates: Updates, ends: dict[str, float]
) -> dict[str, Any]:
    """What a side's row says of its speed; `useful`: the share of positions that are no padding."""
    seconds = median(sum(update.values()) for update in updates)
    positions = train.batch_size * train.seq_len
    return {
        "precision": train.precision,
        "parameters": sum(parameters_by_part(model).values()),
        "seconds_per_step": seconds,
        "positions_per_second": positions / seconds,
        "useful_share": useful,
        "useful_tokens_per_second": useful * positions / seconds,
        "peak_memory_bytes": ends["memory"],
        "mfu": utilisation(model, train, [seconds], ends["matmul_peak"]),
        "matmul_peak": ends["matmul_peak"],
        "bandwidth": ends["bandwidth"],
    }


def part_rows(updates: Updates, bounds: dict[str, float]) -> Rows:
    """A row a part of PARTS, from the seconds by part of several updates."""
    seconds = {name: median(update.get(name, 0.0) for update in updates) for name in PARTS}
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


def _alternate(
    sides: dict[str, Any], batches: dict[str, Any], steps: int
) -> dict[str, tuple[Updates, dict[str, float]]]:
    """Of each side, the seconds by part of its updates, and `_ends`; one unmeasured update first.

    The sides have a process each and take turns.
    """
    updates: dict[str, Updates] = {name: [] for name in sides}
    ends = {}
    with contextlib.ExitStack() as held:
        processes = {name: held.enter_context(own_process()) for name in sides}
        for number in range(steps + 1):
            for name, process in processes.items():
                at = divmod(number, batches[name].steps_per_epoch)
                batch = batches[name].batch(*at)
                updates[name].append(ask(process, _update, *sides[name], number, batch))
        for name, process in processes.items():
            ends[name] = ask(process, _ends, sides[name][-1].precision)
            process.shutdown()  # or its end would disturb the peaks of the next
    return {name: (updates[name][1:], ends[name]) for name in sides}


_training = functools.cache(lambda kind, model, train: kind(model, train))  # one a process


def _update(
    kind: type[Training], model: ModelConfig, train: TrainConfig, number: int, batch: Batch
) -> dict[str, float]:
    seconds = _training(kind, model, train).update(number, batch, watched=kind is Training)
    return seconds | {"optimiser": seconds["clipping"] + seconds["optimiser"], "clipping": 0.0}


def _ends(precision: str) -> dict[str, float]:
    """The process's peak memory, then the device's peaks."""
    memory, device = peak_memory(), best_device()
    peak = matmul_peak(device, DTYPES[precision])
    return {"memory": memory, "matmul_peak": peak, "bandwidth": memory_bandwidth(device)}
