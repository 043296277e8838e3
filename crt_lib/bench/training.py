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

from crt_lib.audit.reference import reference_loss
from crt_lib.bench.parts import PARTS, part_bounds
from crt_lib.bench.process import ask, own_process
from crt_lib.bench.trial import Training
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.data import Batch, make_batches
from crt_lib.runs.machine import measured_on, utilisation
from crt_lib.text.tokenizer import TokenizedCorpus

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
    data: TokenizedCorpus,
    batch_size: int,
    seq_len: int,
    steps: int,
    precision: str = "auto",
) -> tuple[Rows, Rows]:
    """A row a side, and a row a part of our step; medians of `steps`, `case` our side's precision.

    A side's row: seconds a step, useful tokens/s (no padding), peak memory of its own process, MFU
    (`utilisation`) of the fastest matrix product there in its precision. A part's row: its share of
    the step, its bound (`part_bounds`), the share of the bound that it reaches, and its share of
    all that is lost against the bounds.
    """
    config = config.replace(vocab_size=data.tokenizer.vocab_size)
    ours = TrainConfig(gradient_checkpointing=True, grad_accum=1).replace(
        batch_size=batch_size, seq_len=seq_len, precision=precision
    )
    theirs = ours.replace(batching="padded", precision="fp32")
    sides = {
        "released": (Released, config.replace(causal=False), theirs),
        "ours": (Training, config, ours),
    }
    batches = {name: make_batches(train, data) for name, (_, _, train) in sides.items()}
    updates, ends = _alternate(sides, batches, steps)
    case = {"rows": batch_size, "seq_len": seq_len, "case": ends["ours"]["precision"]}
    case |= measured_on()
    rows = []
    for name, (_, model, train) in sides.items():
        useful = 1 - getattr(batches[name], "padding_share", 0.0)
        side = _side(model, train, useful, updates[name], ends[name])
        rows.append(case | {"side": name} | side)
    peak, bandwidth = ends["ours"]["matmul_peak"], ends["ours"]["bandwidth"]
    bounds = part_bounds(config, batch_size, seq_len, peak, bandwidth)
    return rows, [case | row for row in part_rows(updates["ours"], bounds)]


def _side(
    model: ModelConfig, train: TrainConfig, useful: float, updates: Updates, ends: dict[str, Any]
) -> dict[str, Any]:
    """What a side's row says of its speed; `useful`: the share of positions that are no padding."""
    seconds = median(sum(update.values()) for update in updates)
    positions = train.batch_size * train.seq_len
    return {
        "precision": ends["precision"],
        "parameters": ends["parameters"],
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
) -> tuple[dict[str, Updates], dict[str, dict[str, Any]]]:
    """By side, updates after an unmeasured one, and `Training.ends`; each in its own process."""
    updates: dict[str, Updates] = {name: [] for name in sides}
    ends = {}
    with contextlib.ExitStack() as held:
        processes = {name: held.enter_context(own_process()) for name in sides}
        for number in range(steps + 1):
            for name, process in processes.items():
                batch = batches[name].batch(*divmod(number, batches[name].steps_per_epoch))
                updates[name].append(ask(process, _update, sides[name], number, batch))
        for name, process in processes.items():
            ends[name] = ask(process, _ends, sides[name])
            process.shutdown()  # or its end would disturb the peaks of the next
    return {name: own[1:] for name, own in updates.items()}, ends


_training = functools.cache(lambda kind, model, train: kind(model, train))  # one a process


def _update(side: tuple[Any, ...], number: int, batch: Batch) -> dict[str, float]:
    seconds = _training(*side).update(number, batch, watched=side[0] is Training)
    return seconds | {"optimiser": seconds["clipping"] + seconds["optimiser"], "clipping": 0.0}


def _ends(side: tuple[Any, ...]) -> dict[str, Any]:
    return _training(*side).ends()
