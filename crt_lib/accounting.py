"""Parameters and multiply-adds of a model, by part, from its configuration alone."""

import torch

from crt_lib.baselines import make_model
from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.model import count_parameters


def parameters_by_part(config: ModelConfig | GPT2Config) -> dict[str, int]:
    """Parameters of each part; they sum to the model's. Built without allocating any weight."""
    with torch.device("meta"):
        model = make_model(config)
    if isinstance(config, GPT2Config):
        embeddings = model.transformer.wte.weight.numel()
        rest = count_parameters(model) - embeddings
        return {"token embedding": embeddings, "positions and blocks": rest}
    parts = {
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
    cycle = _cycle(config)
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


def _cycle(config: ModelConfig) -> int:
    d, k = config.d_model, config.kernel_size
    mixing = d * d if config.pointwise else 0
    conv = {
        "linear": 0,
        "conv": k * d * d,
        "conv_linear": k * d * d,
        "depthwise": k * d + mixing,
        "depthwise_mlp": k * d + mixing,
    }[config.trm]
    if config.trm not in ("linear", "conv_linear", "depthwise_mlp"):
        return conv
    width = config.mlp_ratio * d
    return conv + (3 * (2 * width // 3) * d if config.activation == "swiglu" else 2 * width * d)
