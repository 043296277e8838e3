"""`crt bench assisted`: trained models in transformers' `generate`, with the drafts it knows.

What else makes a model's greedy text faster and leaves it as it is: the text so far drafts (prompt
lookup), a smaller model does (Leviathan et al. 2022, arXiv:2211.17192), or an early exit of the
same model (LayerSkip; Elhoushi et al. 2024, arXiv:2404.16710).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from crt_lib.bench.gpt2 import COMPILED, compiled_step, gpt2_generate
from crt_lib.bench.ways import Prompts, in_turn, ratio, warmed
from crt_lib.exits.decode import generate
from crt_lib.exits.speculate import Speculation
from crt_lib.files import InputError
from crt_lib.hf.gpt2 import GPT2, transformers
from crt_lib.runs.machine import measured_on

if TYPE_CHECKING:
    from crt_lib.config import LanguageModel

Way = Callable[[Sequence[int], int], list[int]]  # a prompt, and how many tokens to add
ALONE = "generate"
LOOKED_UP, ASSISTED = "the text drafts", "a smaller model drafts"
OWN = "a loop of our own"
DRAFTED = 10  # tokens of a prompt lookup, as transformers documents it


def bench_assisted(
    model: "LanguageModel",
    prompts: Prompts,
    new_tokens: int,
    assistant: "LanguageModel | None" = None,
    *,
    compiled: bool = True,
) -> list[dict[str, Any]]:
    """A row a way: `new_tokens` more of each prompt, greedily, one text at a time.

    transformers' `generate` alone, and with drafts by the text so far, by `assistant`, whose tokens
    are the same, and by each exit of a CRT; drafts as transformers has them by default. Then a loop
    of our own: of a GPT-2 around its forward pass, eager and compiled, of a CRT `crt_lib.generate`,
    also with drafts by the text. The ways take turns with each prompt, whose reading is in their
    time.

    `passes`: of the whole model in `generate`, for a new token. `speedup`: the seconds of
    `generate` alone by the way's, `low` and `high` its 95 % interval over prompts. `same`: the
    share of texts that are those of `generate` alone; rounding parts them where two tokens are
    near. Raises InputError for fewer than two prompts or tokens, and for a GPT-2 of shared layers.
    """
    if min(len(prompts), new_tokens) < 2:
        raise InputError(f"{len(prompts)} prompts, {new_tokens} tokens: at least 2 are timed")
    target = as_transformers(model)
    with torch.inference_mode():
        found = _measured(target, _ways(model, target, assistant, compiled), prompts, new_tokens)
    shape = {"texts": len(prompts), "prompt_tokens": len(prompts[0]), "new_tokens": new_tokens}
    return [
        {"way": name} | shape | _columns(own, found[ALONE]) | measured_on()
        for name, own in found.items()
    ]


def _measured(
    target: nn.Module, ways: dict[str, Way], prompts: Prompts, new_tokens: int
) -> dict[str, list[tuple[list[int], float, int]]]:
    """The text, seconds and passes of each prompt, by way, of the ways that can be compiled."""
    there = warmed(ways, lambda way: way(prompts[0], new_tokens))
    found: dict[str, list[tuple[list[int], float, int]]] = {name: [] for name in there}
    passes: list[int] = []

    def count(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        if named.get("exit_policy") is None:  # else it is a draft
            passes.append(1)

    target.register_forward_pre_hook(count, with_kwargs=True)
    turns = zip(prompts, in_turn([*found], len(prompts)), strict=True)
    for prompt, turn in tqdm(turns, "texts", len(prompts), disable=None):
        for name in turn:
            passes.clear()
            start = time.perf_counter()
            text = ways[name](prompt, new_tokens)
            found[name].append((text, time.perf_counter() - start, len(passes)))
    return found


def _columns(own: Sequence[tuple[Any, ...]], alone: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    texts, seconds, passes = zip(*own, strict=True)
    theirs, before, _ = zip(*alone, strict=True)
    tokens = sum(map(len, texts))
    same = [a == b for a, b in zip(texts, theirs, strict=True)]
    against = ratio(np.array(before), np.array(seconds))
    return {
        "tokens_per_second": tokens / sum(seconds),
        **dict(zip(("speedup", "low", "high"), against, strict=False)),
        "passes": sum(passes) / tokens or None,
        "same": sum(same) / len(same),
    }


def _ways(
    model: "LanguageModel", target: nn.Module, assistant: "LanguageModel | None", compiled: bool
) -> dict[str, Way]:
    ways: dict[str, Way] = {ALONE: partial(_generated, target)}
    ways[LOOKED_UP] = partial(_generated, target, prompt_lookup_num_tokens=DRAFTED)
    if assistant is not None:
        ways[ASSISTED] = partial(_generated, target, assistant_model=as_transformers(assistant))
    if isinstance(model, GPT2):
        ways[OWN] = partial(_looped, model, None)
        if compiled:
            ways[OWN + COMPILED] = partial(_looped, model, compiled_step())
        return ways
    for loop in model.config.exit_loops:
        ways[f"exit {loop} drafts"] = partial(_generated, target, assistant_early_exit=loop)
    ways[OWN] = lambda prompt, new_tokens: generate(model, [prompt], new_tokens)[0].tokens
    by_text = Speculation(model, 0)
    ways[f"{OWN}, {LOOKED_UP}"] = lambda *given: by_text.generate(*given).tokens
    return ways


def as_transformers(model: "LanguageModel") -> nn.Module:
    """The model with transformers' `generate`; a GPT-2 keeps its weights, a CRT is copied.

    Raises InputError for a GPT-2 of shared layers: transformers would give them one cache.
    """
    if isinstance(model, GPT2):
        if model.config.kind != "gpt2":
            raise InputError(f"a GPT-2 of {model.config.kind} layers cannot be generated from")
        made = transformers().GPT2LMHeadModel(model.transformer.config)
        made.transformer = model.transformer
        made.lm_head.weight = model.transformer.wte.weight
        return made.eval()
    from crt_lib.hf.model import CRTForCausalLM

    return CRTForCausalLM.from_crt(model)


def _generated(target: Any, prompt: Sequence[int], new_tokens: int, **drafts: Any) -> list[int]:
    ids = torch.tensor([prompt], device=target.device)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    how |= {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
    return target.generate(ids, **how, **drafts)[0, len(prompt) :].tolist()


def _looped(model: GPT2, step: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    return gpt2_generate(model, step, [prompt], new_tokens, each=lambda tokens: None)[0].tolist()
