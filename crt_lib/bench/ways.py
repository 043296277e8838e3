"""The ways of decoding that `crt bench decode` times, and the time that reading the weights takes.

A way continues prompts of one length greedily and calls `each` whenever tokens are there.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds
from crt_lib.cached.products import Layout, check_quantize
from crt_lib.config import GPT2Config, make_model
from crt_lib.exits.decode import Each, Speculation, generate
from crt_lib.exits.policy import CRITERIA, Policy, exits_of
from crt_lib.files import InputError
from crt_lib.hf.gpt2 import GPT2
from crt_lib.model import CRT, Block, TRMEmbedding

Prompts = Sequence[Sequence[int]]
Way = Callable[[Prompts, int, Each], Any]  # prompts, new tokens, each
Planned = tuple[Callable[[Tensor], Tensor], Tensor]  # a product and what it multiplies
FULL = "full depth"
UNCACHED = ("no cache, every head", "no cache")
INT8 = "full depth, int8"
COMPILED = ", compiled"
NEVER = {"similarity": "full depth, similarity asked", "gate": "full depth, gate asked"}


def ways_of(model: CRT, policies: Mapping[str, Policy], batch_size: int) -> dict[str, Way]:
    """The ways by name, full depth first."""
    ways: dict[str, Way] = {
        name: _generating(model, policy=policy)
        for name, policy in {FULL: policies[FULL], **policies, **asking(model)}.items()
    }
    if can_quantize(model):
        ways[INT8] = _generating(model, quantize="int8")
    for loop in model.config.exit_loops if batch_size == 1 else ():
        ways[f"speculation from {loop}"] = _speculating(Speculation(model, loop))
    ways[UNCACHED[0]] = lambda *given: generate_as_released(model, *given)
    ways[UNCACHED[1]] = _generating(model, cache=False)
    gpt2 = matched_gpt2(model)
    name = f"GPT-2 {gpt2.config.d_model} x {gpt2.config.n_layers}"
    ways[name] = lambda *given: gpt2_generate(gpt2, *given)
    ways[name + COMPILED] = CompiledGPT2(gpt2)
    return ways


def _generating(model: CRT, **options: Any) -> Way:
    return lambda prompts, n, each: generate(model, prompts, n, each=each, **options)


def _speculating(draft: Speculation) -> Way:
    return lambda prompts, n, each: [draft.generate(prompts[0], n, each=each)]


class Never(Policy):
    """Asks a criterion at every exit, and no token passes."""

    def threshold(self, loop: int) -> float:
        """Above every score."""
        return 2.0


def asking(model: CRT) -> dict[str, Policy]:
    """Full depth with a question at every exit: against full depth it is what asking costs."""
    names = [name for name in NEVER if name != "gate" or model.gate is not None]
    return {NEVER[name]: Never(name) for name in names}


def can_quantize(model: CRT) -> bool:
    """Whether `generate` takes 8-bit weights of this model here."""
    try:
        check_quantize("int8", model.loop_encoding)
    except InputError:
        return False
    return True


def generate_as_released(
    model: CRT, prompts: Prompts, new_tokens: int, each: Each | None = None
) -> Tensor:
    """Tokens (B, new_tokens) by the model's forward alone, every head of every position."""
    ids = torch.tensor(prompts, device=model.loop_encoding.device)
    for _ in range(new_tokens):
        logits = model(ids)[model.config.n_loops]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if each is not None:
            each(ids[:, -1].tolist())
    return ids[:, -new_tokens:]


def matched_gpt2(model: CRT) -> GPT2:
    """An untrained GPT-2 as wide as `model`, with the layers that bring it nearest in
    multiply-adds a token to full depth and one head.
    """
    config, like = model.config, model.loop_encoding
    wanted = _a_token(config)
    settings = [
        GPT2Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_layers=layers,
            max_seq_len=config.max_seq_len,
        )
        for layers in range(1, 65)
    ]
    best = min(settings, key=lambda settings: abs(_a_token(settings) - wanted))
    return make_model(best).to(like).eval()


def _a_token(config: Any) -> int:
    return sum(multiply_adds(config, 1, config.head_loops[-1:]).values())


def gpt2_generate(model: GPT2, prompts: Prompts, new_tokens: int, each: Each) -> Tensor:
    """Tokens (B, new_tokens) with transformers' growing cache."""
    device = model.transformer.wte.weight.device
    waiting, cache, made = torch.tensor(prompts, device=device), None, []
    for _ in range(new_tokens):
        output = model.transformer(waiting, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.last_hidden_state[:, -1] @ model.transformer.wte.weight.T
        waiting = logits.argmax(-1, keepdim=True)
        made.append(waiting)
        each(waiting[:, 0].tolist())
    return torch.cat(made, 1)


class CompiledGPT2:
    """The same with transformers' static cache and a compiled step; the prompt is read eagerly.

    Raises InputError where nothing can be compiled.
    """

    def __init__(self, model: GPT2):
        self.model = model
        self.step = torch.compile(self._next, dynamic=False)

    def __call__(self, prompts: Prompts, new_tokens: int, each: Each) -> Tensor:
        from transformers import StaticCache

        transformer = self.model.transformer
        cache = StaticCache(transformer.config, max_cache_len=len(prompts[0]) + new_tokens)
        ids = torch.tensor(prompts, device=transformer.wte.weight.device)
        made = [self._next(ids, cache, torch.arange(ids.shape[1], device=ids.device)[None])]
        each(made[-1][:, 0].tolist())
        for at in range(ids.shape[1], ids.shape[1] + new_tokens - 1):
            position = torch.full((1, 1), at, device=ids.device)
            made.append(self._compiled(made[-1], cache, position))
            each(made[-1][:, 0].tolist())
        return torch.cat(made, 1)

    def _compiled(self, *given: Any) -> Tensor:
        from torch._inductor.exc import InductorError, InvalidCxxCompiler

        try:
            return self.step(*given)
        except (InductorError, InvalidCxxCompiler) as error:
            raise InputError(f"torch.compile: {str(error).splitlines()[0]}") from error

    def _next(self, ids: Tensor, cache: Any, positions: Tensor) -> Tensor:
        output = self.model.transformer(
            ids, past_key_values=cache, use_cache=True, position_ids=positions
        )
        logits = output.last_hidden_state[:, -1] @ self.model.transformer.wte.weight.T
        return logits.argmax(-1, keepdim=True)


class Reading:
    """The products of one new token of each of `rows` rows, and nothing else: the matvec bound.

    Every product is in the faster of the layer's own layout and `Layout`'s. A loop's weights are
    read again by the next, as in the model. With `length` also the keys and values of so many
    tokens, which every loop has of its own.
    """

    def __init__(self, model: CRT, rows: int, length: int):
        config = model.config
        self.loops, self.layout = config.n_loops, Layout(rows)
        first = [self._of(w) for w in _weights(model.embed)]
        for block in model.prelude:
            first += [self._of(w) for w in _weights(cast(Block, block))]
        self.embedding, self.block = first, [self._of(w) for w in _weights(model.block)]
        self.head = [self._of(w) for w in _head_weights(model)]
        like, heads = model.loop_encoding, rows * config.n_heads
        width = config.d_model // config.n_heads
        kept = torch.randn(config.n_loops, 2, heads, length, width).to(like)
        self.query, self.scores = kept[0, 0, :, :1], kept.new_ones(heads, 1, length)
        self.kept = [(keys.mT, values) for keys, values in kept.unbind(0)]

    def __call__(self, keys_and_values: bool) -> dict[str, float]:
        """Seconds of the embedding, of one loop (the mean of all) and of the last head."""
        marks = [time.perf_counter()]
        _run(self.embedding)
        marks.append(time.perf_counter())
        for keys, values in self.kept:
            _run(self.block)
            if keys_and_values:
                torch.bmm(self.query, keys)
                torch.bmm(self.scores, values)
        marks.append(time.perf_counter())
        _run(self.head)
        marks.append(time.perf_counter())
        embedding, loops, head = (b - a for a, b in itertools.pairwise(marks))
        return {"embedding": embedding, "loop": loops / self.loops, "head": head}

    def _of(self, weight: Tensor) -> Planned:
        x = torch.randn(self.layout.rows, weight.shape[1]).to(weight)
        products: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: F.linear(x, weight),
            self.layout.of(weight, None),
        )
        return min(products, key=lambda product: _fastest(product, x)), x


def _run(products: Sequence[Planned]) -> None:
    for product, x in products:
        product(x)


def _fastest(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        product(x)
        best = min(best, time.perf_counter() - started)
    return best


def _weights(module: Block | TRMEmbedding) -> list[Tensor]:
    """The matrices (out, in) that a token meets in a block or embedding, repeated cycles too."""
    trm = module.trm if isinstance(module, Block) else module
    named = [pair for pair in module.named_parameters() if "cycles." not in pair[0]]
    for i in range(len(trm.dilations)):
        named += trm.cycles[i % len(trm.cycles)].named_parameters()
    left_out = ("tokens.", "depthwise.")
    return [p.detach().flatten(1) for name, p in named if p.ndim > 1 and not _has(name, left_out)]


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def _head_weights(model: CRT) -> list[Tensor]:
    last, config = model.config.n_loops, model.config
    if config.head_sharing != "tied":
        return [model.readout(last, model.loop_encoding[:1])[1].detach()]
    narrow = [p.detach() for p in model.heads[str(last)].parameters() if p.ndim > 1]
    return [*narrow, model.embed.tokens.weight.detach()]


def asks_of(model: CRT, policy: Policy, loops: Sequence[int]) -> tuple[float, float]:
    """Vocabulary heads and questions a token, of tokens that left after these loops."""
    asked, last = exits_of(policy, model.config)
    before = [loop for loop in asked if loop < last]
    asks = [sum(own <= loop for own in before) for loop in loops]
    with_head = policy.criterion is not None and CRITERIA[policy.criterion].heads
    # the head that was asked at the exit that a token leaves by is the one that predicts
    heads = [n + (loop == last) if with_head else 1 for n, loop in zip(asks, loops, strict=True)]
    return sum(heads) / len(loops), sum(asks) / len(loops)
