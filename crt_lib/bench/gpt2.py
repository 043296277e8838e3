"""A GPT-2 of transformers that costs what a model does, and the ways it decodes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds
from crt_lib.config import AnyModelConfig, GPT2Config, make_model
from crt_lib.exits.decode import Each
from crt_lib.model import CRT

Step = Callable[[Any, Tensor, Any, Tensor], Tensor]
COMPILED = ", compiled"


def gpt2_ways(model: CRT) -> dict[str, Callable[..., Any]]:
    """An untrained GPT-2 with about the multiply-adds of `model`: as it is, and compiled."""
    config = model.config
    shared = ("vocab_size", "d_model", "n_heads", "max_seq_len")
    like_ours = GPT2Config().replace(**{name: getattr(config, name) for name in shared})
    settings = matched(like_ours, config, 1)
    gpt2 = make_model(settings).to(model.loop_encoding).eval()
    name = f"GPT-2 {settings.d_model} x {settings.n_layers}"
    compiled = torch.compile(_step, dynamic=False)
    return {
        name: partial(gpt2_generate, gpt2, None),
        name + COMPILED: partial(gpt2_generate, gpt2, compiled),
    }


def cost_of_a_token(config: AnyModelConfig, seq_len: int) -> int:
    """Multiply-adds of a token at full depth, with the last head alone."""
    return sum(multiply_adds(config, seq_len, config.head_loops[-1:]).values())


def matched(gpt2: Any, config: AnyModelConfig, seq_len: int) -> GPT2Config:
    """`gpt2` with the layers that bring it nearest to `config` in multiply-adds a token."""
    wanted = cost_of_a_token(config, seq_len)
    tried = (gpt2.replace(n_layers=layers) for layers in range(1, 65))
    return min(tried, key=lambda own: abs(cost_of_a_token(own, seq_len) - wanted))


def gpt2_generate(
    model: Any,
    compiled: Step | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    each: Each,
) -> Tensor:
    """Tokens (B, new_tokens) with transformers' growing cache; with a `compiled` step its static
    one, the prompt read eagerly.
    """
    from transformers import DynamicCache, StaticCache

    transformer, longest = model.transformer, len(prompts[0]) + new_tokens
    waiting = torch.tensor(prompts, device=transformer.wte.weight.device)
    cache: Any = DynamicCache()
    if compiled is not None:
        cache = StaticCache(transformer.config, max_cache_len=longest)
    made: list[Tensor] = []
    step: Step = _step
    for at in range(len(prompts[0]), longest):
        positions = torch.arange(at - waiting.shape[1], at, device=waiting.device)[None]
        waiting = step(transformer, waiting, cache, positions)
        step = compiled or step
        made.append(waiting)
        each(waiting[:, 0].tolist())
    return torch.cat(made, 1)


def _step(transformer: Any, ids: Tensor, cache: Any, positions: Tensor) -> Tensor:
    """The tokens (B, 1) that follow."""
    output = transformer(ids, past_key_values=cache, use_cache=True, position_ids=positions)
    return (output.last_hidden_state[:, -1] @ transformer.wte.weight.T).argmax(-1, keepdim=True)
