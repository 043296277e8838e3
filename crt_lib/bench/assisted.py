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
from torch import Tensor, nn
from tqdm import tqdm

from crt_lib.bench.gpt2 import COMPILED, compiled_step, gpt2_generate
from crt_lib.bench.ways import Prompts, in_turn, ratio
from crt_lib.files import InputError
from crt_lib.hf.gpt2 import GPT2, transformers
from crt_lib.runs.machine import measured_on

if TYPE_CHECKING:
    from crt_lib.config import LanguageModel

Way = Callable[[Sequence[int], int], Tensor]  # a prompt, new tokens; (1, T)
ALONE = "generate"
LOOKED_UP, ASSISTED = "the text drafts", "a smaller model drafts"
LOOP = "a loop around the model"
DRAFTED = 10  # tokens of a prompt lookup, as transformers documents it
WARM_UP = 16  # tokens


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
    are the same, and by each exit of a CRT. A GPT-2 also in a loop around its forward pass, eager
    and compiled. The ways take turns with each prompt, whose reading is in their time.

    `passes`: of the model in `generate`, for a new token; drafts of its own exits are among them.
    `speedup`: the seconds of `generate` alone by the way's, `low` and `high` its 95 % interval over
    prompts. `same`: the share of texts that are those of `generate` alone; rounding parts them
    where two tokens are near.

    Raises InputError for fewer than two prompts or tokens.
    """
    if min(len(prompts), new_tokens) < 2:
        raise InputError(f"{len(prompts)} prompts, {new_tokens} tokens: at least 2 are timed")
    target, passes = as_transformers(model), list[int]()
    ways = _ways(model, target, assistant, compiled)
    target.register_forward_pre_hook(lambda *given: passes.append(1))
    found: dict[str, list[tuple[list[int], float, int]]] = {name: [] for name in ways}
    with torch.inference_mode():
        for way in (*ways.values(), *ways.values()):
            way(prompts[0], min(WARM_UP, new_tokens))
        turns = zip(prompts, in_turn([*ways], len(prompts)), strict=True)
        for prompt, turn in tqdm(turns, "texts", len(prompts), disable=None):
            for name in turn:
                passes.clear()
                start = time.perf_counter()
                (text,) = ways[name](prompt, new_tokens).tolist()
                taken = time.perf_counter() - start
                found[name].append((text[-new_tokens:], taken, len(passes)))
    shape = {"texts": len(prompts), "prompt_tokens": len(prompts[0]), "new_tokens": new_tokens}
    return [
        {"way": name} | shape | _columns(own, found[ALONE]) | measured_on()
        for name, own in found.items()
    ]


def _columns(own: Sequence[tuple[Any, ...]], alone: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    texts, seconds, passes = zip(*own, strict=True)
    theirs, before, _ = zip(*alone, strict=True)
    tokens = sum(map(len, texts))
    same = [a == b for a, b in zip(texts, theirs, strict=True)]
    against = ratio(np.array(before), np.array(seconds))
    return {
        "tokens_per_second": tokens / sum(seconds),
        **dict(zip(("speedup", "low", "high"), against, strict=True)),
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
        steps = {LOOP: None} | ({LOOP + COMPILED: compiled_step()} if compiled else {})
        return ways | {name: partial(_looped, model, step) for name, step in steps.items()}
    for loop in model.config.exit_loops:
        ways[f"exit {loop} drafts"] = partial(_generated, target, assistant_early_exit=loop)
    return ways


def as_transformers(model: "LanguageModel") -> nn.Module:
    """The model with transformers' `generate`; a GPT-2 keeps its weights, a CRT is copied."""
    if isinstance(model, GPT2):
        made = transformers().GPT2LMHeadModel(model.transformer.config)
        made.transformer = model.transformer
        made.lm_head.weight = model.transformer.wte.weight
        return made.eval()
    from crt_lib.hf.model import CRTForCausalLM

    return CRTForCausalLM.from_crt(model)


def _generated(target: Any, prompt: Sequence[int], new_tokens: int, **drafts: Any) -> Tensor:
    ids = torch.tensor([prompt], device=target.device)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    how |= {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
    return target.generate(ids, **how, **drafts)


def _looped(model: GPT2, step: Any, prompt: Sequence[int], new_tokens: int) -> Tensor:
    return gpt2_generate(model, step, [prompt], new_tokens, each=lambda tokens: None)
