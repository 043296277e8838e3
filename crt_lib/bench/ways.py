"""Ways of decoding, and how their time is taken.

A way continues prompts of one length greedily and calls `each` whenever tokens are there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds
from crt_lib.cached.products import check_quantize
from crt_lib.config import AnyModelConfig, GPT2Config, make_model
from crt_lib.exits.decode import Each, generate
from crt_lib.exits.policy import CRITERIA, Policy, exits_of
from crt_lib.exits.speculate import Speculation
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.runs.machine import wait

Prompts = Sequence[Sequence[int]]
Way = Callable[..., Any]  # of prompts, new tokens, and `each` by its name
Step = Callable[[Any, Tensor, Any, Tensor], Tensor]
FULL = "full depth"
UNCACHED = ("no cache, every head", "no cache")
INT8 = "full depth, int8"
COMPILED = ", compiled"


def in_turn(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The names of each round, which all begin with another."""
    for number in range(rounds):
        begin = number * len(names) // rounds
        yield [*names[begin:], *names[:begin]]


def timed(way: Way, prompts: Prompts, new_tokens: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """What a way made; of each time that tokens came, the seconds waited and a row's tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marks, tokens = [time.perf_counter()], []

    def each(new: list[int]) -> None:
        wait(device)
        marks.append(time.perf_counter())
        tokens.append(len(new) // len(prompts))

    made = way(prompts, new_tokens, each=each)
    return made, np.diff(marks), np.array(tokens)


def latencies(waits: np.ndarray) -> dict[str, float]:
    """Milliseconds of waits (..., T) in seconds: quantiles, and the median of the first ones."""
    low, middle, high = 1e3 * np.nanpercentile(waits[..., 1:], (5, 50, 95))
    first = 1e3 * np.median(waits[..., 0])
    return {"ms": middle, "ms_p5": low, "ms_p95": high, "first_ms": float(first)}


def ways_of(model: CRT, policies: Mapping[str, Policy], batch_size: int) -> dict[str, Way]:
    """The ways by name, full depth first."""
    chosen = {FULL: policies[FULL], **policies, **asking(model)}
    ways: dict[str, Way] = {n: partial(generate, model, policy=p) for n, p in chosen.items()}
    with contextlib.suppress(InputError):  # other weights, or another device
        check_quantize("int8", model.loop_encoding)
        ways[INT8] = partial(generate, model, quantize="int8")
    for loop in (0, *model.config.exit_loops) if batch_size == 1 else ():
        ways[f"speculation from {loop or 'the text'}"] = partial(
            speculated, Speculation(model, loop)
        )
    ways[UNCACHED[0]] = partial(generate_as_released, model)
    ways[UNCACHED[1]] = partial(generate, model, cache=False)
    config = model.config
    shared = ("vocab_size", "d_model", "n_heads", "max_seq_len")
    like_ours = GPT2Config().replace(**{name: getattr(config, name) for name in shared})
    settings = matched(like_ours, config, 1)
    gpt2 = make_model(settings).to(model.loop_encoding).eval()
    name = f"GPT-2 {settings.d_model} x {settings.n_layers}"
    ways[name] = partial(gpt2_generate, gpt2, None)
    ways[name + COMPILED] = partial(gpt2_generate, gpt2, torch.compile(_step, dynamic=False))
    return ways


def speculated(draft: Speculation, prompts: Prompts, new_tokens: int, **how: Any) -> list[Any]:
    """A way of one prompt: lossless, by self-speculation."""
    return [draft.generate(prompts[0], new_tokens, **how)]


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
    model: CRT, prompts: Prompts, new_tokens: int, *, each: Each = lambda tokens: None
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
    model: Any, compiled: Step | None, prompts: Prompts, new_tokens: int, *, each: Each
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
