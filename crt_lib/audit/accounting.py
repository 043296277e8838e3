"""Parameters and multiply-adds of a model, by part, from its configuration alone."""

import torch
from torch import nn

from crt_lib.config import GPT2Config, ModelConfig, make_model


def parameters_by_part(config: ModelConfig | GPT2Config) -> dict[str, int]:
    """Parameters of each part; they sum to the model's. Built without allocating any weight."""
    if isinstance(config, GPT2Config):
        with torch.device("meta"):
            gpt2 = make_model(config)
        embeddings = gpt2.transformer.wte.weight.numel()
        rest = count_parameters(gpt2) - embeddings
        return {"token embedding": embeddings, "positions and blocks": rest}
    with torch.device("meta"):
        model = make_model(config)
    parts: dict[str, list[nn.Module]] = {
        "token embedding": [model.embed.tokens],
        "embedding projection": [model.embed.proj],
        "embedding TRM": [model.embed.cycles],
        "prelude": [model.prelude],
        "attention": [model.block.attention],
        "block TRM": [model.block.trm],
        "heads": [model.heads, *([model.exit_norms] if config.exit_norm else [])],
    }
    counts = {name: sum(map(count_parameters, modules)) for name, modules in parts.items()}
    if not config.n_prelude:
        del counts["prelude"]
    counts["positions and loop encodings"] = sum(p.numel() for p in model.parameters(recurse=False))
    norms = (m for name, m in model.block.named_children() if name.startswith("norm"))
    counts["block norms"] = sum(map(count_parameters, norms))
    return counts


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


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each counted once however often it is used."""
    return sum(p.numel() for p in model.parameters())
