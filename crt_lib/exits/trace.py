"""Exit traces: what each exit says of each token, kept, so that policies are judged at once.

A trace holds numbers only (losses, scores, flags): no text, no token it could be read back from.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crt_lib.audit.accounting import multiply_adds
from crt_lib.audit.compare import document_of_tokens
from crt_lib.config import ModelConfig
from crt_lib.exits.policy import CRITERIA, Loop, Policy
from crt_lib.exits.scoring import by_token, guesses, load_arrays, save_arrays
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.text.tokenizer import TokenizedCorpus, Tokenizer

GUESSES = 3  # of a place of a passage, by exit
ARRAYS = ("loss", "right", "changed", "document")


@dataclass(frozen=True)
class Trace:
    """Of N tokens and E exits, in a full pass: the context of a token has run all loops.

    When exits are taken while decoding, the context has left too (`evaluate_with_exits`).
    """

    config: ModelConfig
    seq_len: int  # positions of a window
    loss: np.ndarray  # (N, E) nats
    right: np.ndarray  # (N, E) bool: the most probable token is the next one
    changed: np.ndarray  # (N, E - 1) bool: the most probable token is not that of the exit before
    scores: dict[str, np.ndarray]  # criterion -> (N, E - 1); the gate's only if there is one
    document: np.ndarray  # (N,) index of the token's document, or window (`make_trace`), ascending
    about: dict[str, Any]  # corpus, split, tokenizer

    @property
    def loops(self) -> tuple[int, ...]:
        """The loops of the E exits."""
        return self.config.head_loops

    @cached_property
    def costs(self) -> tuple[np.ndarray, int]:
        """Multiply-adds a token up to each exit without any head (E,), and those of a head."""
        by_exit = [multiply_adds(self.config, self.seq_len, (loop,)) for loop in self.loops]
        head = by_exit[0]["heads"]
        return np.array([sum(parts.values()) - head for parts in by_exit]), head

    def scores_of(self, criterion: str) -> np.ndarray:
        """Those of `criterion` (N, E - 1); InputError if there are none."""
        if criterion not in self.scores:
            raise InputError(f"the trace has no {criterion}; it has {', '.join(self.scores)}")
        return self.scores[criterion]

    def thresholds(self, criterion: str, points: int) -> list[float]:
        """Quantiles of the scores of `criterion`, ascending, in [0, 1]."""
        quantiles = np.quantile(self.scores_of(criterion), np.linspace(0, 1, points))
        return np.unique(quantiles.clip(0, 1)).tolist()

    def some(self, kept: slice | np.ndarray) -> "Trace":
        """A trace of these tokens alone, whose documents count from 0."""
        own: dict[str, Any] = {name: getattr(self, name)[kept] for name in ARRAYS}
        own["document"] = np.unique(own["document"], return_inverse=True)[1].astype(np.int32)
        return replace(self, scores={k: v[kept] for k, v in self.scores.items()}, **own)

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file, atomically."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        arrays["document"] = np.bincount(self.document)  # of each, how many
        arrays |= {f"score.{k}": v for k, v in self.scores.items() if k != "agreement"}
        about = {"config": self.config.to_dict(), "seq_len": self.seq_len, "about": self.about}
        save_arrays(path, "trace", arrays, about)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what `save` wrote; raises InputError for a file that is not one."""
        arrays, about = load_arrays(path, "trace")
        scores = {k.removeprefix("score."): v for k, v in arrays.items() if "." in k}
        changed, counts = arrays["changed"], arrays["document"]
        # the criterion's scores, which `changed` holds already
        scores["agreement"] = np.pad(1 - changed[:, :-1].astype(np.float32), ((0, 0), (1, 0)))
        scores = {name: scores[name] for name in CRITERIA if name in scores}  # as when it was made
        arrays["document"] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        about["config"] = ModelConfig.from_dict(about["config"])
        return cls(**about, scores=scores, **{name: arrays[name] for name in ARRAYS})


def make_trace(
    model: CRT, data: TokenizedCorpus, split: str, seq_len: int, *, max_tokens: int | None = None
) -> Trace:
    """Score the first `max_tokens` of `split` at every exit in one pass (honest protocol)."""
    ids = data.split(split).ids[:max_tokens]
    owner = document_of_tokens(data, split, seq_len)[0][: len(ids)].astype(np.int32)
    found = by_token(model, ids, data.tokenizer.eot_id, seq_len, _exit)
    about = {"corpus": data.corpus.name, "split": split, "tokenizer": data.tokenizer.name}
    return _trace(model, seq_len, found, owner, about)


@torch.inference_mode()
def make_passage(model: CRT, tokenizer: Tokenizer, text: str) -> Trace:
    """A trace of one text, with its words: `about` has `text`, `tokens`, `guesses` by exit.

    Guesses of a place are the likeliest tokens there, the best first, each with its probability.
    Raises InputError for an empty text and one longer than the model's positions.
    """
    ids = tokenizer.encode(text)
    if not 0 < len(ids) <= model.config.max_seq_len:
        raise InputError(f"the passage has {len(ids)} tokens; give 1 to {model.config.max_seq_len}")
    said: list[list[list[list[Any]]]] = []

    def measure(loop: Loop, targets: Tensor) -> dict[str, Tensor]:
        found = _exit(loop, targets)
        if found:
            tokens = loop.logits.topk(GUESSES, dim=-1).indices
            sure = loop.log_probabilities.gather(-1, tokens).exp()
            places = zip(tokens[0].tolist(), sure[0].tolist(), strict=True)
            said.append([_words(tokenizer, *place) for place in places])
        return found

    found = by_token(model, ids, tokenizer.eot_id, len(ids), measure)
    about = {"text": text, "tokens": [tokenizer.decode([i]) for i in ids], "guesses": said}
    return _trace(model, len(ids), found, np.zeros(len(ids), np.int32), about)


def _trace(model: CRT, seq_len: int, found: dict[str, np.ndarray], *rest: Any) -> Trace:
    """The trace of what `_exit` found, without the guesses: the text could be read from them."""
    changed = np.diff(found["guess"], axis=1) != 0
    scores = {name: found[name] for name in CRITERIA if name in found}
    return Trace(model.config, seq_len, found["loss"], found["right"], changed, scores, *rest)


def _exit(loop: Loop, targets: Tensor) -> dict[str, Tensor]:
    """What is kept of an exit, and its guesses; scores where a token may leave."""
    model = loop.run.model
    if loop.number not in model.config.head_loops:
        return {}
    found = guesses(loop, targets)
    found["right"] = found["guess"] == targets
    if loop.number < model.config.n_loops:
        asked = {name: own for name, own in CRITERIA.items() if name != "gate" or model.gate}
        found |= {name: own.score(loop).float() for name, own in asked.items()}
    return found


def _words(tokenizer: Tokenizer, tokens: list[int], sure: list[float]) -> list[list[Any]]:
    return [[tokenizer.decode([i]), round(p, 4)] for i, p in zip(tokens, sure, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """A policy on a trace: where each token leaves, what that loses and what it costs."""

    exit: np.ndarray  # (N,) index into the trace's loops
    loss: float  # nats a token
    mean_loops: float
    heads: float  # vocabulary heads computed a token
    asks: float  # times that the criterion was asked a token
    multiply_adds: float  # a token, those heads included
    shares: tuple[float, ...]  # of the tokens, by exit

    @property
    def token_ppl(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)

    def losses(self, trace: Trace) -> np.ndarray:
        """Nats (N,) of each token of `trace`, which it is of."""
        return np.take_along_axis(trace.loss, self.exit[:, None], 1)[:, 0]


def apply_policy(trace: Trace, policy: Policy) -> Outcome:
    """Where each token of `trace` leaves under `policy`; raises InputError for exits it has not."""
    allowed = trace.loops[:-1] if policy.exits is None else policy.exits
    last = trace.loops[-1] if policy.fixed is None else policy.fixed
    for loop in (*allowed, last):
        if loop not in trace.loops:
            raise InputError(f"exit {loop} is not in the trace, which has {trace.loops}")
    exit_of = np.full(len(trace.loss), trace.loops.index(last))
    if policy.criterion is None:
        return _outcome(trace, exit_of)
    scores, criterion = trace.scores_of(policy.criterion), CRITERIA[policy.criterion]
    before = trace.loops[:-1]
    asks = np.array([loop in allowed and loop < last for loop in before], bool)
    unseen = [i > 0 and before[i - 1] not in allowed for i in range(len(before))]
    heads = asks * (criterion.heads + criterion.compares * np.array(unseen, int))
    passes = asks & (scores >= np.array([policy.threshold(loop) for loop in before], scores.dtype))
    leaves = passes.any(1)
    exit_of[leaves] = passes[leaves].argmax(1)
    # up to each exit; the head that was asked where a token leaves is the one that predicts
    asked, computed = (np.append(each, 0).cumsum()[exit_of] for each in (asks, heads))
    return _outcome(trace, exit_of, computed + 1 - criterion.heads * leaves, asked)


def oracle(trace: Trace) -> Outcome:
    """Every token at the cheapest exit that is right, or the best one if none is: a bound."""
    first = np.where(trace.right.any(1), trace.right.argmax(1), trace.loss.argmin(1))
    return _outcome(trace, first)


def _outcome(
    trace: Trace, exit_of: np.ndarray, heads: np.ndarray | int = 1, asks: np.ndarray | int = 0
) -> Outcome:
    """Of tokens that leave at `exit_of`, each after so many heads and asks."""
    without, head = trace.costs
    counts = np.bincount(exit_of, minlength=len(trace.loops))
    return Outcome(
        exit=exit_of,
        loss=float(np.take_along_axis(trace.loss, exit_of[:, None], 1).mean(dtype=np.float64)),
        mean_loops=float(np.array(trace.loops)[exit_of].mean()),
        heads=float(np.mean(heads)),
        asks=float(np.mean(asks)),
        multiply_adds=float((without[exit_of] + heads * head).mean()),
        shares=tuple((counts / len(exit_of)).tolist()),
    )


def calibrate(trace: Trace, criterion: str, allowed: float) -> Policy:
    """The cheapest constant threshold and last exit whose loss is at most log(1 + allowed) above
    that of full depth.

    `allowed` is a share of the perplexity: 0.005 for +0.5 %; negative, it asks for better than full
    depth. A fixed exit where asking costs more than leaving saves; full depth where nothing keeps
    the promise. Raises InputError for -1 or less, and for a criterion that the trace has not.
    """
    if allowed <= -1:
        raise InputError(f"the allowed loss is {allowed}; it must be above -1")
    limit = float(trace.loss[:, -1].mean(dtype=np.float64)) + math.log1p(allowed)
    taus = sorted({*trace.thresholds(criterion, 101), 1.0})
    best, least = Policy(), apply_policy(trace, Policy()).multiply_adds
    for fixed in (*trace.loops[:-1], None):
        asking = [Policy(criterion, tau, tau, 1.0, fixed=fixed) for tau in taus]
        for policy in (Policy(fixed=fixed), *asking):
            outcome = apply_policy(trace, policy)
            if outcome.loss <= limit and outcome.multiply_adds < least:
                best, least = policy, outcome.multiply_adds
    return best


def chance(valid: Trace, test: Trace, allowed: float, seed: int = 0) -> Outcome:
    """What tokens drawn without looking at them reach on `test`: the line a criterion must beat.

    Two fixed exits, each token at one of them by chance, in the cheapest shares whose loss on
    `valid` is at most log(1 + allowed) above that of full depth.
    """
    losses = valid.loss.mean(0, dtype=np.float64)
    limit, costs = losses[-1] + math.log1p(allowed), valid.costs[0]
    best = costs[-1], len(losses) - 1, len(losses) - 1, 0.0
    for i, early in enumerate(losses):
        for j, late in enumerate(losses):
            if late > limit or costs[i] > costs[j]:
                continue
            share = 1.0 if early <= limit else (limit - late) / (early - late)
            best = min(best, (share * costs[i] + (1 - share) * costs[j], i, j, share))
    _, i, j, share = best
    early = np.random.default_rng(seed).random(len(test.loss)) < share
    return _outcome(test, np.where(early, i, j))
