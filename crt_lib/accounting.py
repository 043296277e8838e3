"""Parameters and multiply-adds of a CRT, by part, from its configuration alone."""

import torch

from crt_lib.config import ModelConfig
from crt_lib.model import CRT


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part; they sum to the model's. Built without allocating any weight."""
    with torch.device("meta"):
        model = CRT(config)
    parts = {
        "token embedding": model.embed.tokens,
        "embedding projection": model.embed.proj,
        "embedding TRM": model.embed.cycles,
        "attention": model.block.attention,
        "block TRM": model.block.trm,
        "heads": model.heads,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["positions and loop encodings"] = model.positions.numel() + model.loop_encoding.numel()
    norms = (model.block.norm1, model.block.norm2)
    counts["block norms"] = sum(p.numel() for norm in norms for p in norm.parameters())
    return counts


def multiply_adds(
    config: ModelConfig, seq_len: int, exits: tuple[int, ...] | None = None
) -> dict[str, int]:
    """Multiply-adds a token of a forward pass over `seq_len` positions, by part.

    `exits`: the loops whose heads are computed (default: all); loops after the deepest are not run.
    Matrix products and convolutions are counted, as torch's FlopCounterMode does; attention counts
    every pair of positions, as the dense kernel computes them. Norms and activations are not.
    """
    exits = config.head_loops if exits is None else exits
    d, loops = config.d_model, max(exits)
    cycle = _cycle(config)
    head = d * config.vocab_size
    if config.head_sharing == "tied":
        head = d * (d // 2) + (d // 2) * config.vocab_size
    return {
        "embedding projection": (d // 2) * d,
        "embedding TRM": config.n_embed_cycles * cycle,
        "attention": loops * (4 * d * d + 2 * seq_len * d),
        "block TRM": loops * config.n_cycles * cycle,
        "heads": len(exits) * head,
    }


def _cycle(config: ModelConfig) -> int:
    d, k = config.d_model, config.kernel_size
    conv = {
        "linear": 0,
        "conv": k * d * d,
        "conv_linear": k * d * d,
        "depthwise": k * d + d * d,
        "depthwise_mlp": k * d + d * d,
    }[config.trm]
    has_mlp = config.trm in ("linear", "conv_linear", "depthwise_mlp")
    return conv + (2 * config.mlp_ratio * d * d if has_mlp else 0)
