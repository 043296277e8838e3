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
from tqdm import tqdm

from crt_lib.bench.gpt2 import COMPILED as COMPILED, gpt2_ways
from crt_lib.cached.products import check_quantize
from crt_lib.exits.decode import Each, generate
from crt_lib.exits.policy import CRITERIA, Policy, exits_of
from crt_lib.exits.speculate import Speculation
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.runs.machine import wait

Prompts = Sequence[Sequence[int]]
Way = Callable[..., Any]  # of prompts, new tokens, and `each` by its name
FULL = "full depth"
UNCACHED = ("no cache, every head", "no cache")
INT8 = "full depth, int8"
PROMPT_TOKENS = 32
FEWEST, RESAMPLED = 10, 2_000  # an interval of fewer pairs would be too narrow


def passages(ids: np.ndarray, count: int, length: int) -> list[list[int]]:
    """`count` passages of `length` tokens, evenly spread over a text and apart.

    Raises InputError for a text that is too short.
    """
    if count * length > len(ids):
        raise InputError(
            f"{count} passages of {length} tokens: the text has {len(ids)}; ask for fewer"
        )
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[at : at + length].tolist() for at in starts]


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


def ratio(over: np.ndarray, under: np.ndarray) -> list[float]:
    """The ratio of two sums; from FEWEST pairs on also its 95 % interval: they are resampled."""
    found = [over.sum() / under.sum()]
    if len(over) >= FEWEST:
        picked = np.random.default_rng(0).integers(len(over), size=(RESAMPLED, len(over)))
        found += [*np.percentile(over[picked].sum(1) / under[picked].sum(1), (2.5, 97.5))]
    return found


def warmed(ways: Mapping[str, Way], run: Callable[[Way], Any]) -> dict[str, Any]:
    """What `run` made of each way, the second time; not of those that cannot be compiled here."""
    made = {}
    for name, way in ways.items():
        try:
            _, made[name] = run(way), run(way)
        except RuntimeError as error:
            if not name.endswith(COMPILED):
                raise
            tqdm.write(f"{name} is left out: torch.compile: {str(error).splitlines()[0]}")
    return made


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
    ways |= gpt2_ways(model)
    return ways


def speculated(draft: Speculation, prompts: Prompts, new_tokens: int, **how: Any) -> list[Any]:
    """A way of one prompt: what `draft` writes."""
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


def asks_of(model: CRT, policy: Policy, loops: Sequence[int]) -> tuple[float, float]:
    """Vocabulary heads and questions a token, of tokens that left after these loops."""
    asked, last = exits_of(policy, model.config)
    before = [loop for loop in asked if loop < last]
    asks = [sum(own <= loop for own in before) for loop in loops]
    with_head = policy.criterion is not None and CRITERIA[policy.criterion].heads
    # the head that was asked at the exit that a token leaves by is the one that predicts
    heads = [n + (loop == last) if with_head else 1 for n, loop in zip(asks, loops, strict=True)]
    return sum(heads) / len(loops), sum(asks) / len(loops)
