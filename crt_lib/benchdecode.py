"""`crt bench decode`: what exits, caches and speculation save in time, and what they lose."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crt_lib.baselines import GPT2, make_model
from crt_lib.config import GPT2Config
from crt_lib.decode import Generated, Speculated, Speculation, generate
from crt_lib.device import wait
from crt_lib.exits import CRITERIA, Policy
from crt_lib.files import InputError
from crt_lib.manifest import run_environment
from crt_lib.model import CRT, count_parameters
from crt_lib.tokenizer import TokenizedCorpus
from crt_lib.trace import Outcome, Trace, apply_policy

Way = Callable[[list[list[int]], int], Any]
COLUMNS = ("tau", "mean_loops", "multiply_adds", "token_ppl")
COLUMNS += ("decoded_loops", "decoded_heads", "decoded_asks", "accepted")
FULL = "full depth"
UNCACHED_ROUNDS = 2  # they are the slowest by far, and vary least


@dataclass(frozen=True)
class Pace:
    """Measured seconds a token: of each loop, vocabulary head and question to a criterion, and of
    all else.
    """

    fixed: float
    loop: float
    head: float
    ask: float = 0.0

    def tokens_per_second(self, outcome: Outcome) -> float:
        """Of a policy whose tokens run these loops and ask these heads."""
        spent = self.loop * outcome.mean_loops + self.head * outcome.heads
        return 1 / (self.fixed + spent + self.ask * outcome.asks)


def measured_pace(rows: Sequence[Mapping[str, Any]]) -> Pace:
    """The pace that fits rows of `bench_decode` best (least squares), one text at a time.

    Raises InputError when there are fewer than three cached ways with exits among them.
    """
    cached = [row for row in rows if row["batch"] == 1 and "no cache" not in row["way"]]
    names = ("decoded_loops", "decoded_heads", "decoded_asks")
    fit = {  # a way that is the same as another was timed once
        (1.0, *(row[name] for name in names)): 1 / row["tokens_per_second"]
        for row in cached
        if row.get("decoded_loops") is not None
    }
    if len(fit) < 3:
        raise InputError("a pace needs three or more measured ways of decoding one text at a time")
    known, seconds = np.array(list(fit)), np.array(list(fit.values()))
    return Pace(*map(float, np.linalg.lstsq(known, seconds, rcond=None)[0]))


def bench_decode(
    model: CRT,
    prompts: Sequence[Sequence[int]],
    policies: Mapping[str, Policy],
    losses: Mapping[str, float],
    test: Trace,
    *,
    batch_size: int = 1,
    new_tokens: int = 256,
    repeats: int = 3,
    uncached: bool = True,
) -> list[dict[str, Any]]:
    """A row a way of decoding: tokens/s, speed against full depth, cost and perplexity.

    Ways: without a cache, and as the released code would (besides, the logits of every position at
    every head), each of the named `policies` (`crt_lib.analysis.named_policies`), "full depth"
    among them, for a batch of one speculation from each exit, and an untrained GPT-2 of the same
    parameter count with transformers' own cache. Perplexities are those of `losses`, nats a token
    by policy; mean loops and multiply-adds are of the trace `test`. Greedy; prompts of one length,
    `batch_size` of them at a time, one batch after the other.

    The ways take turns, `repeats` rounds: tokens/s is of the median round, `speedup` the median of
    the ratios within a round; the ways without a cache take only `UNCACHED_ROUNDS` turns. A policy
    that is equal to an earlier one is not timed again.
    """
    prompts = [list(prompt) for prompt in prompts]
    if not prompts or len(prompts) % batch_size:
        raise InputError(f"{len(prompts)} prompts are not whole batches of {batch_size}")
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    ways = _ways(model, policies, batch_size)
    if not uncached:
        ways = {name: way for name, way in ways.items() if "no cache" not in name}
    first: dict[Policy, str] = {}
    for name, policy in policies.items():
        first.setdefault(policy, name)
    same = {name: first[policy] for name, policy in policies.items() if first[policy] != name}
    policies = {**policies, "no cache": policies[FULL]}
    losses = {**losses, "no cache": losses[FULL]}
    with torch.inference_mode():
        timed = {name: way for name, way in ways.items() if name not in same}
        seconds, made = _alternate(timed, batches, new_tokens, repeats)
    for name, other in same.items():
        seconds[name], made[name] = seconds[other], made[other]
    environment = run_environment()
    rows = []
    for name in ways:
        row: dict[str, Any] = {"way": name, "batch": batch_size, "texts": len(prompts)}
        row |= {"prompt_tokens": len(prompts[0]), "new_tokens": new_tokens}
        row |= dict.fromkeys(COLUMNS)
        if name in policies:
            policy = policies[name]
            outcome = apply_policy(test, policy)
            row["tau"] = policy.tau0 if policy.criterion else None
            row |= {
                "mean_loops": outcome.mean_loops,
                "multiply_adds": outcome.multiply_adds,
                "token_ppl": math.exp(losses[name]),
                **_decoded(model, policy, made[name]),
            }
        if isinstance(made[name][0], Speculated):
            drafted = sum(one.drafted for one in made[name])
            row["accepted"] = sum(one.accepted for one in made[name]) / max(drafted, 1)
        row |= {
            "tokens_per_second": len(prompts) * new_tokens / float(np.median(seconds[name])),
            "speedup": float(np.median(seconds[FULL][: len(seconds[name])] / seconds[name])),
            "rounds": len(seconds[name]),
            "precision": str(model.loop_encoding.dtype).removeprefix("torch."),
            "device": environment["device"],
            "threads": environment["torch_threads"],
        }
        rows.append(row)
    return rows


def first_prompts(
    data: TokenizedCorpus, seq_len: int, count: int, tokens: int = 32
) -> list[list[int]]:
    """The first `tokens` of each of the first `count` windows of valid."""
    ids = data.valid.ids
    return [ids[i * seq_len :][:tokens].tolist() for i in range(count)]


def _decoded(model: CRT, policy: Policy, made: Sequence[Generated]) -> dict[str, float]:
    """Mean loops, vocabulary heads and questions of the tokens that were made, by any exit."""
    loops = [loop for one in made for loop in one.loops]
    last = policy.fixed or model.config.n_loops
    before = [loop for loop in model.config.head_loops if loop < last]
    asks = [sum(own <= loop for own in before) if policy.criterion else 0 for loop in loops]
    with_head = policy.criterion is not None and CRITERIA[policy.criterion].heads
    # the head that was asked at the exit that a token leaves by is the one that predicts
    heads = [n + (loop == last) if with_head else 1 for n, loop in zip(asks, loops, strict=True)]
    return {
        "decoded_loops": float(np.mean(loops)),
        "decoded_heads": float(np.mean(heads)),
        "decoded_asks": float(np.mean(asks)),
    }


def _ways(model: CRT, policies: Mapping[str, Policy], batch_size: int) -> dict[str, Way]:
    ways: dict[str, Way] = {
        "no cache, every head": lambda prompts, n: generate_as_released(model, prompts, n),
        "no cache": lambda prompts, n: generate(model, prompts, n, cache=False),
    }
    for name, policy in policies.items():
        ways[name] = lambda prompts, n, policy=policy: generate(model, prompts, n, policy=policy)
    if batch_size == 1:
        for loop in model.config.exit_loops:
            draft = Speculation(model, loop)
            ways[f"speculation from {loop}"] = lambda prompts, n, d=draft: [
                d.generate(prompts[0], n)
            ]
    gpt2 = matched_gpt2(model)
    ways[f"GPT-2 {gpt2.config.d_model} x {gpt2.config.n_layers}"] = lambda prompts, n: (
        gpt2_generate(gpt2, prompts, n)
    )
    return ways


def generate_as_released(
    model: CRT, prompts: Sequence[Sequence[int]], new_tokens: int
) -> torch.Tensor:
    """Greedy tokens (B, new_tokens) by the model's forward alone, prompts of one length."""
    ids = torch.tensor(prompts, device=model.loop_encoding.device)
    for _ in range(new_tokens):
        logits = model(ids)[model.config.n_loops]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[:, -new_tokens:]


def matched_gpt2(model: CRT) -> GPT2:
    """An untrained GPT-2 as wide as `model` with the layers that bring it nearest in parameters."""
    config, wanted = model.config, count_parameters(model)
    best: GPT2 | None = None
    like = model.loop_encoding
    for layers in range(1, 33):
        made = make_model(
            GPT2Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                n_heads=config.n_heads,
                n_layers=layers,
                max_seq_len=config.max_seq_len,
            )
        ).to(like)
        made.eval()
        if best and abs(count_parameters(best) - wanted) < abs(count_parameters(made) - wanted):
            break
        best = made
    return best


def gpt2_generate(model: GPT2, prompts: Sequence[Sequence[int]], new_tokens: int) -> torch.Tensor:
    """Greedy tokens (B, new_tokens) with transformers' cache, prompts of one length."""
    device = model.transformer.wte.weight.device
    waiting, cache, made = torch.tensor(prompts, device=device), None, []
    for _ in range(new_tokens):
        output = model.transformer(waiting, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.last_hidden_state[:, -1] @ model.transformer.wte.weight.T
        waiting = logits.argmax(-1, keepdim=True)
        made.append(waiting)
    return torch.cat(made, 1)


def _alternate(
    ways: dict[str, Way], batches: list[list[list[int]]], new_tokens: int, repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """Seconds of each way by round, and what it made of each text; 8 tokens of one warm up.

    Each round begins with another way, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made = {}
    names = list(ways)
    for name in names:
        ways[name](batches[0], min(8, new_tokens))
    for round_ in range(repeats):
        first = round_ * len(names) // repeats
        for name in names[first:] + names[:first]:
            if "no cache" in name and round_ >= UNCACHED_ROUNDS:
                continue
            started = time.perf_counter()
            made[name] = [one for batch in batches for one in ways[name](batch, new_tokens)]
            wait("cuda" if torch.cuda.is_available() else "cpu")
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(times) for name, times in seconds.items()}, made
