"""`crt bench decode`: what exits, caches and speculation save in time, and what they lose."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from crt_lib.baselines import GPT2, make_model
from crt_lib.config import GPT2Config
from crt_lib.decode import Speculation, generate
from crt_lib.exits import CRITERIA, Policy
from crt_lib.manifest import run_environment
from crt_lib.model import CRT, count_parameters
from crt_lib.tokenizer import TokenizedCorpus
from crt_lib.trace import Trace, apply_policy, calibrate, make_trace

Way = Callable[[list[list[int]], int], Any]


def bench_decode(
    model: CRT,
    data: TokenizedCorpus,
    seq_len: int,
    *,
    batch_size: int = 1,
    new_tokens: int = 256,
    prompt_tokens: int = 32,
    repeats: int = 3,
    trace_tokens: int = 50_000,
    allowed: float = 0.005,
    uncached: bool = True,
) -> list[dict[str, Any]]:
    """A row a way of decoding: tokens/s (median, the ways taking turns), cost and perplexity.

    Ways: without a cache, full depth, each fixed exit, each criterion calibrated on valid to lose
    `allowed` of the perplexity, speculation from each exit, and an untrained GPT-2 of the same
    parameter count with transformers' own cache. Loss, mean loops and multiply-adds are of test, by
    its trace. Prompts are the first tokens of valid's windows. Greedy.
    """
    valid, test = (
        make_trace(model, data, split, seq_len, max_tokens=trace_tokens)
        for split in ("valid", "test")
    )
    ways, policies = _ways(model, valid, batch_size, allowed)
    if not uncached:
        del ways["no cache"]
    ids = data.valid.ids
    prompts = [ids[i * seq_len :][:prompt_tokens].tolist() for i in range(batch_size)]
    with torch.inference_mode():
        seconds = _alternate(ways, prompts, new_tokens, repeats)
    full = seconds["full depth"]
    environment = run_environment()
    rows = []
    for name, taken in seconds.items():
        row: dict[str, Any] = {"way": name, "batch": batch_size, "new_tokens": new_tokens}
        row |= dict.fromkeys(("tau", "mean_loops", "multiply_adds", "token_ppl"))
        if name in policies:
            policy = policies[name]
            outcome = apply_policy(test, policy)
            row["tau"] = policy.tau0 if policy.criterion else None
            row |= {
                "mean_loops": outcome.mean_loops,
                "multiply_adds": outcome.multiply_adds,
                "token_ppl": outcome.token_ppl,
            }
        row |= {
            "tokens_per_second": batch_size * new_tokens / taken,
            "speedup": full / taken,
            "device": environment["device"],
            "threads": environment["torch_threads"],
        }
        rows.append(row)
    return rows


def _ways(
    model: CRT, valid: Trace, batch_size: int, allowed: float
) -> tuple[dict[str, Way], dict[str, Policy]]:
    policies = {"full depth": Policy()}
    policies |= {f"exit {loop}": Policy(fixed=loop) for loop in model.config.exit_loops}
    for criterion in CRITERIA:
        policies[criterion] = calibrate(valid, criterion, allowed)
    ways: dict[str, Way] = {
        "no cache": lambda prompts, n: generate(model, prompts, n, cache=False),
    }
    for name, policy in policies.items():
        ways[name] = lambda prompts, n, policy=policy: generate(model, prompts, n, policy=policy)
    if batch_size == 1:
        for loop in model.config.exit_loops:
            draft = Speculation(model, loop)
            ways[f"speculation from {loop}"] = lambda prompts, n, d=draft: d.generate(prompts[0], n)
    gpt2 = matched_gpt2(model)
    ways[f"GPT-2 {gpt2.config.d_model} x {gpt2.config.n_layers}"] = lambda prompts, n: (
        gpt2_generate(gpt2, prompts, n)
    )
    return ways, policies | {"no cache": Policy()}


def matched_gpt2(model: CRT) -> GPT2:
    """An untrained GPT-2 as wide as `model` with the layers that bring it nearest in parameters."""
    config, wanted = model.config, count_parameters(model)
    best: GPT2 | None = None
    for layers in range(1, 33):
        made = make_model(
            GPT2Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                n_heads=config.n_heads,
                n_layers=layers,
                max_seq_len=config.max_seq_len,
            )
        ).eval()
        if best and abs(count_parameters(best) - wanted) < abs(count_parameters(made) - wanted):
            break
        best = made
    return best


def gpt2_generate(model: GPT2, prompts: Sequence[Sequence[int]], new_tokens: int) -> torch.Tensor:
    """Greedy tokens (B, new_tokens) with transformers' cache, prompts of one length."""
    waiting, cache, made = torch.tensor(prompts), None, []
    for _ in range(new_tokens):
        output = model.transformer(waiting, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.last_hidden_state[:, -1] @ model.transformer.wte.weight.T
        waiting = logits.argmax(-1, keepdim=True)
        made.append(waiting)
    return torch.cat(made, 1)


def _alternate(
    ways: dict[str, Way], prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, float]:
    """Median seconds of each way; one round of 8 tokens warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(1 + repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way(prompts, new_tokens if round_ else min(8, new_tokens))
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
