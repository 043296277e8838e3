"""How long models of some shapes take to write a token, side by side."""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from crt_lib.bench.gpt2 import gpt2_generate
from crt_lib.bench.trial import ask, own_process
from crt_lib.bench.ways import in_turn, timed
from crt_lib.config import AnyModelConfig, make_model
from crt_lib.exits.decode import generate
from crt_lib.model import CRT
from crt_lib.runs.machine import measured_on

TEXTS, PROMPT, NEW = 12, 32, 128  # of each model, and their tokens


def bench_tokens(models: Mapping[str, AnyModelConfig]) -> list[dict[str, Any]]:
    """A row a model: the milliseconds of a token, on one thread, one text at a time, greedily.

    The median over TEXTS random prompts, taken in turn, their reading left out; by `crt_lib`'s
    caches, or for a GPT-2 transformers' growing one. The weights are random too. The machine should
    have nothing else to do.
    """
    with own_process(threads=1) as process:
        found = ask(process, _times, dict(models), NEW)
    return [
        {"arm": arm, "texts": TEXTS, "ms": ms, **measured_on(threads=1)}
        for arm, ms in found.items()
    ]


def _times(models: Mapping[str, AnyModelConfig], new_tokens: int) -> dict[str, float]:
    ways: dict[str, Callable[..., Any]] = {}
    for name, config in models.items():
        model = make_model(config).eval()
        if isinstance(model, CRT):
            ways[name] = partial(generate, model)
        else:
            ways[name] = partial(gpt2_generate, model, None)
    waits: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for number, turn in enumerate(in_turn([*ways], TEXTS)):
            generator = torch.Generator().manual_seed(number)
            words = min(config.vocab_size for config in models.values())
            prompt = torch.randint(words, (PROMPT,), generator=generator).tolist()
            for name in turn:
                waits[name] += timed(ways[name], [prompt], new_tokens)[1][1:].tolist()
    return {name: 1e3 * median(of) for name, of in waits.items()}
