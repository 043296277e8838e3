"""`crt bench train`: a training step as released against ours, alternating on one machine.

As released: the plain reference model (explicit attention, full logits at four heads), symmetric
convolutions, padded lines, float32, checkpointing. Ours: the fast path on packed windows. Both have
the same parameters, rows and positions, clip the gradient and take an AdamW step.
"""

from typing import Any

import torch
from torch import Tensor

from crt_lib.audit.reference import reference_loss
from crt_lib.bench.parts import PARTS, part_bounds
from crt_lib.bench.trial import AFTER, Side, Training, Trial, in_order, take_turns
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.data import make_batches
from crt_lib.runs.machine import measured_on, utilisation
from crt_lib.text.tokenizer import TokenizedCorpus

CASE = ("rows", "seq_len", "case", "device", "isa", "threads")  # what rows of one comparison share

Rows = list[dict[str, Any]]


class Ours(Training):
    """Our training, timed by part."""

    watched = True


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
    train = TrainConfig(gradient_checkpointing=True, grad_accum=1).replace(
        batch_size=batch_size, seq_len=seq_len, precision=precision
    )
    plain = train.replace(batching="padded", precision="fp32")
    sides: dict[str, Side] = {
        "released": (Released, config.replace(causal=False), plain),
        "ours": (Ours, config, train),
    }
    batches = {name: make_batches(settings, data) for name, (*_, settings) in sides.items()}
    turns = take_turns(sides, {name: in_order(own) for name, own in batches.items()}, steps=steps)
    ends, rows = turns["ours"].ends, []
    case = {"rows": batch_size, "seq_len": seq_len, "case": ends["precision"]} | measured_on()
    for name, (_, model, settings) in sides.items():
        own, update = turns[name].ends, turns[name].update()
        speed = batch_size * seq_len / update
        useful = 1 - getattr(batches[name], "padding_share", 0.0)
        row = case | {"side": name} | own
        row |= {"seconds_per_step": update, "positions_per_second": speed}
        row |= {"useful_share": useful, "useful_tokens_per_second": useful * speed}
        row["mfu"] = utilisation(model, settings, [update], own["matmul_peak"])
        rows.append(row)
    bounds = part_bounds(config, batch_size, seq_len, ends["matmul_peak"], ends["bandwidth"])
    return rows, [case | row for row in part_rows(turns["ours"], bounds)]


def part_rows(trial: Trial, bounds: dict[str, float]) -> Rows:
    """A row a part of PARTS; clipping is the optimiser's."""
    seconds = {name: trial.part(name) for name in PARTS}
    seconds["optimiser"] = trial.part(*AFTER)
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
