"""GPT-2s of transformers beside a model, as large or as costly, and the ways they decode."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.config import AnyModelConfig, GPT2Config, make_model
from crt_lib.exits.decode import Each
from crt_lib.model import CRT

Step = Callable[[Any, Tensor, Any, Tensor], Tensor]
COMPILED = ", compiled"


def gpt2_ways(model: CRT) -> dict[str, Callable[..., Any]]:
    """Untrained GPT-2s with about the multiply-adds of `model`, and about its parameters.

    Each as it is, and compiled.
    """
    config = model.config
    shared = ("vocab_size", "d_model", "n_heads", "max_seq_len")
    like_ours = GPT2Config().replace(**{name: getattr(config, name) for name in shared})
    ways, compiled = dict[str, Callable[..., Any]](), compiled_step()
    for cost in (partial(cost_of_a_token, seq_len=1), parameters):
        settings = matched(like_ours, config, cost)
        gpt2 = make_model(settings).to(model.loop_encoding).eval()
        ways[name_of(settings)] = partial(gpt2_generate, gpt2, None)
        ways[name_of(settings) + COMPILED] = partial(gpt2_generate, gpt2, compiled)
    return ways


def compiled_step() -> Step:
    """A decoding step of a GPT-2, compiled for each model, batch and length.

    Where these are too many that is an error, not an eager step.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(_step, dynamic=False)


def name_of(config: GPT2Config) -> str:
    """How a GPT-2 is called: its width and its layers."""
    return f"GPT-2 {config.d_model} x {config.n_layers}"


def parameters(config: AnyModelConfig) -> int:
    """How many a model has."""
    return sum(parameters_by_part(config).values())


def cost_of_a_token(config: AnyModelConfig, seq_len: int) -> int:
    """Multiply-adds of a token at full depth, with the last head alone."""
    return sum(multiply_adds(config, seq_len, config.head_loops[-1:]).values())


def matched(gpt2: Any, config: AnyModelConfig, cost: Callable[[AnyModelConfig], int]) -> GPT2Config:
    """`gpt2` with the layers that bring it nearest to `config` in `cost`."""
    wanted = cost(config)
    tried = (gpt2.replace(n_layers=layers) for layers in range(1, 65))
    return min(tried, key=lambda own: abs(cost(own) - wanted))


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
