"""What a model costs: parameters and multiply-adds by part, and the time of each exit."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from crt_lib.audit.asking import probe_ids
from crt_lib.cached.step import evaluating
from crt_lib.config import GPT2Config, ModelConfig, make_model
from crt_lib.evaluate import Model, logits_of
from crt_lib.files import InputError

# What a part's parameters are called, and how the part is called.
_PARTS = {
    "embed.tokens": "token embedding",
    "embed.proj": "embedding projection",
    "embed.cycles": "embedding TRM",
    "prelude": "prelude",
    "block.attention": "attention",
    "block.trm": "block TRM",
    "heads": "heads",
    "exit_norms": "heads",
    "positions": "positions and loop encodings",
    "loop_encoding": "positions and loop encodings",
    "injection": "positions and loop encodings",
    "block.norm": "block norms",
    "transformer.wte": "token embedding",
    "transformer": "positions and blocks",
}


def parameters_by_part(config: ModelConfig | GPT2Config) -> dict[str, int]:
    """Parameters of each part; they sum to the model's. Built without allocating any weight."""
    with torch.device("meta"):
        model = make_model(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(part for start, part in _PARTS.items() if name.startswith(start))
        counts[part] += parameter.numel()
    return {part: counts[part] for part in _PARTS.values() if part in counts}


def multiply_adds(
    config: ModelConfig | GPT2Config, seq_len: int, exits: tuple[int, ...] | None = None
) -> dict[str, int]:
    """Multiply-adds a token of a forward pass over `seq_len` positions, by part.

    `exits`: the loops whose heads are computed (default: all); loops after the deepest are not run.
    Matrix products and convolutions are counted, as torch's FlopCounterMode does; attention counts
    every pair of positions, as the dense kernel computes them. Norms and activations are not.
    """
    d = config.d_model
    attention = 4 * d * d + 2 * seq_len * d
    if isinstance(config, GPT2Config):
        return {
            "attention": config.n_layers * attention,
            "MLP": config.n_layers * 8 * d * d,
            "heads": d * config.vocab_size,
        }
    exits = config.head_loops if exits is None else exits
    width, loops = config.embedding_width, max(exits)
    cycle = sum(cycle_multiply_adds(config).values())
    projection = 0 if width == d else width * d
    head = d * config.vocab_size
    if config.head_sharing == "tied":
        head = projection + width * config.vocab_size
    return {
        "embedding projection": projection,
        "embedding TRM": config.n_embed_cycles * cycle,
        "attention": (config.n_prelude + loops) * attention,
        "block TRM": (config.n_prelude + loops) * config.n_cycles * cycle,
        "heads": len(exits) * head,
    }


def cycle_multiply_adds(config: ModelConfig) -> dict[str, int]:
    """Multiply-adds a token of one TRM cycle: depthwise taps, the convolution's products, MLP."""
    d, k = config.d_model, config.kernel_size
    depthwise = config.trm.startswith("depthwise")
    if depthwise:
        products = d * d if config.pointwise else 0
    else:
        products = 0 if config.trm == "linear" else k * d * d
    mlp = 0
    if config.trm in ("linear", "conv_linear", "depthwise_mlp"):
        width = config.mlp_ratio * d
        mlp = 3 * (2 * width // 3) * d if config.activation == "swiglu" else 2 * width * d
    return {"depthwise": k * d if depthwise else 0, "convolution": products, "MLP": mlp}


@dataclass(frozen=True)
class ParameterReport:
    """Parameters by part, each counted once."""

    parts: dict[str, int]
    others: dict[str, int]  # totals: each use with its own, or by how a CRT's heads are shared

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = self.parts | {"total": self.total} | self.others
        return "\n".join(f"{name:<28}{count:>14,}" for name, count in rows.items())


def parameter_report(model: nn.Module | ModelConfig) -> ParameterReport:
    """What the parameters of a model are, or those of a configuration without building it.

    Raises InputError for a plain function, which has none.
    """
    config = model if isinstance(model, ModelConfig) else getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        sharings = {
            f"heads {name}": sum(parameters_by_part(config.replace(head_sharing=name)).values())
            for name in ("separate", "shared_aux", "tied")
        }
        return ParameterReport(parameters_by_part(config), sharings)
    if not isinstance(model, nn.Module):
        raise InputError("a plain function has no parameters to count; give a module")
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[".".join(name.split(".")[:-1][:2]) or "of its own"] += parameter.numel()
    untied = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    return ParameterReport(dict(counts), {"each use with its own": untied})


@dataclass(frozen=True)
class SpeedReport:
    """A row an exit, the last one the whole model; a model without exits has the one row 0.

    Millions of `multiply-adds` a token, with the exit's own head, and `by torch`; `ms` of a forward
    pass, the median. The whole model's over the exit's: of loops (`claimed`), of multiply-adds
    (`ratio`, and where each exit on the way asks its head), `measured`. NaN: not known.
    """

    positions: int
    rows: tuple[dict[str, float], ...]

    def __str__(self) -> str:
        lines = [[*self.rows[0]], *([f"{x:.4g}" for x in row.values()] for row in self.rows)]
        table = ("".join(f"{cell:>14}" for cell in line).replace("nan", "  -") for line in lines)
        end = f"forward passes over {self.positions} positions; multiply-adds in millions a token"
        return "\n".join([*table, end])


@torch.inference_mode()
def speed_report(
    model: Model, vocab_size: int, *, seq_len: int = 64, repeats: int = 5
) -> SpeedReport:
    """Loops claimed, multiply-adds counted twice, and time: `repeats` passes to each exit in turn.

    torch's counter does not see the depthwise taps, which are products of tensors.
    """
    ids = probe_ids(model, vocab_size, seq_len, seed=0)
    config: Any = getattr(model, "config", None)
    ours = isinstance(config, ModelConfig)
    exits = config.head_loops if ours else (0,)
    passes = [
        partial(model, ids, exits=(loop,)) if ours else partial(logits_of, model, ids)
        for loop in exits
    ]
    counted = []
    with evaluating(model):
        for run in passes:  # torch counts nothing of attention's fused kernel on a CPU
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            counted.append(counter.get_total_flops() / 2 / seq_len / 1e6)
        threads = torch.get_num_threads()
        timers = [Timer("run()", globals={"run": run}, num_threads=threads) for run in passes]
        rounds = [[timer.timeit(1).mean for timer in timers] for _ in range(repeats)]
    seconds = np.median(rounds, axis=0).tolist()

    def formula(*exits: int) -> float:
        if not isinstance(config, ModelConfig | GPT2Config):
            return math.nan
        return sum(multiply_adds(config, seq_len, exits).values()) / 1e6

    rows = (
        {
            "exit": loop,
            "loops": loop if ours else math.nan,
            "claimed": exits[-1] / loop if ours else math.nan,
            "multiply-adds": formula(loop),
            "by torch": counted[i],
            "ratio": formula(exits[-1]) / formula(loop),
            "asking heads": formula(exits[-1]) / formula(*exits[: i + 1]),
            "ms": seconds[i] * 1e3,
            "measured": seconds[-1] / seconds[i],
        }
        for i, loop in enumerate(exits)
    )
    return SpeedReport(seq_len, tuple(rows))
