"""The ways of decoding that `crt bench decode` times.

A way continues prompts of one length greedily and calls `each` whenever tokens are there.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds
from crt_lib.cached.products import check_quantize
from crt_lib.config import AnyModelConfig, GPT2Config, make_model
from crt_lib.exits.decode import Each, Speculation, generate
from crt_lib.exits.policy import CRITERIA, Policy, exits_of
from crt_lib.files import InputError
from crt_lib.hf.gpt2 import GPT2
from crt_lib.model import CRT

Prompts = Sequence[Sequence[int]]
Way = Callable[[Prompts, int, Each], Any]  # prompts, new tokens, each
Step = Callable[[Any, Tensor, Any, Tensor], Tensor]
FULL = "full depth"
UNCACHED = ("no cache, every head", "no cache")
INT8 = "full depth, int8"
COMPILED = ", compiled"


def ways_of(model: CRT, policies: Mapping[str, Policy], batch_size: int) -> dict[str, Way]:
    """The ways by name, full depth first."""

    def ours(**options: Any) -> Way:
        return lambda prompts, n, each: generate(model, prompts, n, each=each, **options)

    ways = {name: ours(policy=p) for name, p in {FULL: policies[FULL], **policies}.items()}
    ways |= {name: ours(policy=policy) for name, policy in asking(model).items()}
    with contextlib.suppress(InputError):  # other weights, or another device
        check_quantize("int8", model.loop_encoding)
        ways[INT8] = ours(quantize="int8")
    for loop in model.config.exit_loops if batch_size == 1 else ():
        ways[f"speculation from {loop}"] = partial(_speculated, Speculation(model, loop))
    ways[UNCACHED[0]] = partial(generate_as_released, model)
    ways[UNCACHED[1]] = ours(cache=False)
    config = model.config
    shared = ("vocab_size", "d_model", "n_heads", "max_seq_len")
    like_ours = GPT2Config().replace(**{name: getattr(config, name) for name in shared})
    settings = matched(like_ours, config, 1)
    gpt2 = make_model(settings).to(model.loop_encoding).eval()
    name = f"GPT-2 {settings.d_model} x {settings.n_layers}"
    ways[name] = partial(gpt2_generate, gpt2, None)
    ways[name + COMPILED] = partial(gpt2_generate, gpt2, torch.compile(_step, dynamic=False))
    return ways


def _speculated(draft: Speculation, prompts: Prompts, new_tokens: int, each: Each) -> list[Any]:
    return [draft.generate(prompts[0], new_tokens, each=each)]


class Never(Policy):
    """Asks a criterion at every exit, and no token passes."""

    def threshold(self, loop: int) -> float:
        """Above every score."""
        return 2.0


def asking(model: CRT) -> dict[str, Policy]:
    """Full depth with a question at every exit: against full depth it is what asking costs."""
    names = ("similarity", "gate") if model.gate is not None else ("similarity",)
    return {f"full depth, {name} asked": Never(name) for name in names}


def generate_as_released(
    model: CRT, prompts: Prompts, new_tokens: int, each: Each = lambda tokens: None
) -> Tensor:
    """Tokens (B, new_tokens) by the model's forward alone, every head of every position."""
    ids = torch.tensor(prompts, device=model.loop_encoding.device)
    for _ in range(new_tokens):
        logits = model(ids)[model.config.n_loops]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        each(ids[:, -1].tolist())
    return ids[:, -new_tokens:]


def cost_of_a_token(config: AnyModelConfig, seq_len: int) -> int:
    """Multiply-adds of a token at full depth, with the last head alone."""
    return sum(multiply_adds(config, seq_len, config.head_loops[-1:]).values())


def matched(gpt2: Any, config: AnyModelConfig, seq_len: int) -> GPT2Config:
    """`gpt2` with the layers that bring it nearest to `config` in multiply-adds a token."""
    wanted = cost_of_a_token(config, seq_len)
    tried = (gpt2.replace(n_layers=layers) for layers in range(1, 65))
    return min(tried, key=lambda own: abs(cost_of_a_token(own, seq_len) - wanted))


def gpt2_generate(
    model: GPT2, compiled: Step | None, prompts: Prompts, new_tokens: int, each: Each
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


def asks_of(model: CRT, policy: Policy, loops: Sequence[int]) -> tuple[float, float]:
    """Vocabulary heads and questions a token, of tokens that left after these loops."""
    asked, last = exits_of(policy, model.config)
    before = [loop for loop in asked if loop < last]
    asks = [sum(own <= loop for own in before) for loop in loops]
    with_head = policy.criterion is not None and CRITERIA[policy.criterion].heads
    # the head that was asked at the exit that a token leaves by is the one that predicts
    heads = [n + (loop == last) if with_head else 1 for n, loop in zip(asks, loops, strict=True)]
    return sum(heads) / len(loops), sum(asks) / len(loops)
