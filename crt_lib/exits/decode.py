"""Text from a model: with exits, with caches, and by lossless self-speculation.

Speculation: the head of an early loop drafts, the deeper loops verify all drafted tokens at once
from their states after that loop, which are exact. Greedy text is that of plain decoding; sampled
text has its distribution (Leviathan et al. 2023, arXiv:2211.17192; a model's own early exit as the
draft: Elhoushi et al. 2024, arXiv:2404.16710).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import check_quantize, wide_on_cpu
from crt_lib.cached.step import Step
from crt_lib.exits.leaving import step_with_exits
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.files import InputError
from crt_lib.model import CRT


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default takes the most probable."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # only the k most probable tokens
    top_p: float = 1.0  # only the fewest most probable that hold this much probability

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (..., V) that is drawn from; greedy, all on the largest logit."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # never overflows
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # what is before holds enough
            p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token for each row of logits (B, V), (B,)."""
        if self.temperature == 0:
            return best(logits)
        return draw(self.probabilities(logits), generator)


def best(logits: Tensor) -> Tensor:
    """The token (B,) of the largest of each row of logits (B, V), the first of several."""
    if wide_on_cpu(logits):
        return torch.from_numpy(logits.numpy().argmax(-1))  # several times as fast as torch's
    return logits.argmax(-1)


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """A sample from each row of probabilities (B, V), (B,)."""
    return torch.multinomial(p, 1, generator=generator)[:, 0]


Each = Callable[[list[int]], None]


@dataclass(frozen=True)
class Generated:
    """New tokens of one prompt, and the exit loop that predicted each."""

    tokens: list[int]
    loops: list[int]


@torch.inference_mode()
def generate(
    model: CRT,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    policy: Policy | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: int | None = None,
    cache: bool = True,
    quantize: str | None = None,
    each: Each | None = None,
) -> list[Generated]:
    """Continue each prompt by up to `new_tokens` tokens, fewer where `stop` is drawn.

    A seed gives the same text. Without `cache` all positions are computed again for every token:
    the slow way that the fast one is compared with. `quantize` "int8" reads large weights in 8 bits
    (after the prompt). `each` is called with every row's new token as it comes. Raises InputError
    for an empty prompt, tokens outside the vocabulary, more positions than the model has, a model
    that sees the future, and 8 bits where they are not to be had.
    """
    policy, sampling = policy or Policy(), sampling or Sampling()
    lengths = _check(model, prompts, new_tokens)
    if quantize is not None:
        check_quantize(quantize, model.loop_encoding)
        if not cache:
            raise InputError("int8 weights are read with a cache; leave cache on")
    waiting, starts = _beside_each_other(prompts, lengths, model.loop_encoding.device)
    generator = torch.Generator(waiting.device).manual_seed(seed)

    def fresh() -> Memory:
        capacity = max(lengths) + new_tokens
        return Memory(model.config, len(prompts), capacity, model.loop_encoding, starts)

    tokens: list[list[int]] = []
    loops: list[list[int]] = []
    unfinished = set(range(len(prompts)))
    was_training = model.training
    model.eval()
    try:
        memory, chosen = fresh(), None
        step = Step(model, memory, quantize) if cache and new_tokens > 1 else None
        while len(tokens) < new_tokens and unfinished:
            if chosen is None or step is None:
                exited = run_with_exits(model, waiting, policy, memory, last=True)
                logits, left = exited.logits[:, -1], exited.loops[:, -1].tolist()
            else:
                logits, left = step_with_exits(step, chosen, policy)
            chosen = sampling.choose(logits, generator)  # (B,)
            tokens.append(chosen.tolist())
            loops.append(left)
            if stop in tokens[-1]:
                unfinished -= {row for row, token in enumerate(tokens[-1]) if token == stop}
            if each is not None:
                each(tokens[-1])
            if not cache:
                memory, waiting = fresh(), torch.cat([waiting, chosen[:, None]], dim=1)
    finally:
        model.train(was_training)
    return [
        _until(stop, [token[row] for token in tokens], [loop[row] for loop in loops])
        for row in range(len(prompts))
    ]


def _beside_each_other(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The prompts (B, longest), padded on the left; where each starts (B,), if any is shorter."""
    longest = max(lengths)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = torch.as_tensor(prompt)
    shorter = min(lengths) < longest
    return ids, longest - torch.tensor(lengths, device=device) if shorter else None


def _until(stop: int | None, tokens: list[int], loops: list[int]) -> Generated:
    end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
    return Generated(tokens[:end], loops[:end])


def _check(model: CRT, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
    config = model.config
    if new_tokens < 0:
        raise InputError(f"new_tokens is {new_tokens}; it must be at least 0")
    if not prompts:
        raise InputError("no prompt was given")
    for prompt in prompts:
        if len(prompt) == 0:
            raise InputError("a prompt is empty; begin with at least one token, as end-of-text")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(
                f"a prompt has tokens outside the vocabulary 0..{config.vocab_size - 1}"
            )
    longest = max(map(len, prompts))
    if longest + new_tokens > config.max_seq_len:
        raise InputError(
            f"{longest} tokens of prompt and {new_tokens} new ones are more than the model's "
            f"{config.max_seq_len} positions; shorten one of them"
        )
    return [len(prompt) for prompt in prompts]


@dataclass(frozen=True)
class Speculated(Generated):
    """Also what speculation did: drafts made, and how many of them the full model kept."""

    drafted: int
    accepted: int


class Speculation:
    """Lossless decoding of one prompt: loops 1..`draft_loop` draft, the others verify.

    The draft length follows what was accepted: one more after a draft that was kept whole, one more
    than what was kept otherwise, within 1..`longest`. Drafts are of the first `shortlist` tokens of
    the vocabulary (None: all), in a trained BPE the most frequent, and of those that the text has
    had, so that a draft costs a part of a head.
    """

    def __init__(
        self, model: CRT, draft_loop: int, longest: int = 16, shortlist: int | None = 2048
    ):
        if draft_loop not in model.config.exit_loops:
            raise InputError(
                f"loop {draft_loop} cannot draft; loops with a head before the last are "
                f"{model.config.exit_loops}"
            )
        if longest < 1:
            raise InputError(f"the longest draft is {longest}; it must be at least 1")
        if shortlist is not None and shortlist < 1:
            raise InputError(f"the shortlist has {shortlist} tokens; it must have at least 1")
        self.model, self.draft_loop, self.longest = model, draft_loop, longest
        self.shortlist = shortlist

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: int | None = None,
        each: Each | None = None,
    ) -> Speculated:
        """Continue `prompt`; arguments and errors as for `crt_lib.exits.decode.generate`.

        `each` is called with the new tokens of a verification.
        """
        model, sampling = self.model, sampling or Sampling()
        _check(model, [prompt], new_tokens)
        like = model.loop_encoding
        step = Step(model, Memory(model.config, 1, len(prompt) + new_tokens, like))
        memory = step.memory
        generator = torch.Generator(like.device).manual_seed(seed)
        tokens: list[int] = []
        drafted = accepted = 0
        length = 1
        _, weight = model.readout(self.draft_loop, like[:1])
        candidates = _Candidates(weight, self.shortlist)
        candidates.add(prompt)
        waiting = torch.as_tensor(prompt, device=like.device)[None]  # not yet in the memory
        was_training = model.training
        model.eval()
        try:
            while len(tokens) < new_tokens and stop not in tokens:
                budget = min(length, new_tokens - len(tokens) - 1)  # one comes from verifying
                draft = self._draft(waiting, budget, step, candidates, sampling, generator)
                kept, new = self._verify(draft, waiting.shape[1], memory, sampling, generator)
                drafted, accepted = drafted + budget, accepted + kept
                length = min(self.longest, kept + 1)
                tokens += new
                candidates.add(new)
                if each is not None:
                    each(new)
                memory.truncate(len(prompt) + len(tokens) - 1)
                waiting = torch.tensor([new[-1:]], device=like.device)
        finally:
            model.train(was_training)
        done = _until(stop, tokens, [model.config.n_loops] * len(tokens))
        return Speculated(done.tokens, done.loops, drafted, accepted)

    def _draft(
        self,
        waiting: Tensor,
        budget: int,
        step: Step,
        candidates: "_Candidates",
        sampling: Sampling,
        generator: torch.Generator,
    ) -> "_Draft":
        """Run `waiting`, and the `budget` tokens drawn after it, through the first loops."""
        states, embeddings, tokens, q = [], [], [], []
        for i in range(budget + 1):
            z, embedded = self._first_loops(waiting, step)
            states.append(z)
            embeddings.append(embedded)
            if i == budget:
                break
            features, _ = step.readout(self.draft_loop, z[:, -1])
            logits = F.linear(features, candidates.weight)
            if sampling.temperature == 0:
                chosen = best(logits)
            else:
                p = sampling.probabilities(logits)
                chosen = draw(p, generator)
                q.append(p[0])
            waiting = candidates.tokens[chosen][:, None]
            tokens.append(int(waiting))
        drawn_from = candidates.tokens
        return _Draft(torch.cat(states, 1), torch.cat(embeddings, 1), tokens, drawn_from, q)

    def _first_loops(self, waiting: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The states (1, n, d) after the draft loop, and the embeddings they came from."""
        loops = range(1, self.draft_loop + 1)
        if waiting.shape[1] == 1:
            z = step.begin(waiting[0], self.draft_loop)
            for loop in loops:
                z = step.loop(loop, z)
            step.end(self.draft_loop, settle=False)
            return z[:, None], step.embedded[:, None]
        z, embedded = self.model.begin(waiting, step.memory)
        for loop in loops:
            z = self.model.apply_loop(loop, z, embedded, step.memory.loops[loop - 1])
        return z, embedded

    def _verify(
        self,
        draft: "_Draft",
        first: int,
        memory: Memory,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> tuple[int, list[int]]:
        """How many drafted tokens stay; the new tokens: those, and the one that comes next."""
        model, z = self.model, draft.states
        final = model.config.n_loops
        for loop in range(self.draft_loop + 1, final + 1):
            z = model.apply_loop(loop, z, draft.embedded, memory.loops[loop - 1])
        features, vocabulary = model.readout(final, z[0, first - 1 :])
        # for a few rows on a CPU about twice as fast as features @ vocabulary.T
        logits = (vocabulary @ features.T).T  # (drafted + 1, V)
        if sampling.temperature == 0:
            wanted = best(logits).tolist()
            pairs = zip(draft.tokens, wanted, strict=False)
            kept = next((i for i, (a, b) in enumerate(pairs) if a != b), len(draft.tokens))
            return kept, wanted[: kept + 1]
        p = sampling.probabilities(logits)
        for i, (token, q) in enumerate(zip(draft.tokens, draft.q, strict=True)):
            spread = torch.zeros_like(p[i]).index_add(0, draft.candidates, q)
            ratio = p[i, token] / spread[token]
            if torch.rand((), generator=generator, device=p.device) < ratio:
                continue
            rest = (p[i] - spread).clamp(min=0)
            if float(rest.sum()) == 0:  # rounding: the two are equal
                rest = p[i]
            return i, [*draft.tokens[:i], int(draw(rest[None], generator))]
        following = sampling.choose(logits[-1:], generator)
        return len(draft.tokens), [*draft.tokens, int(following)]


@dataclass(frozen=True)
class _Draft:
    states: Tensor  # (1, n, d) after the draft loop, the last drafted token's included
    embedded: Tensor  # (1, n, d)
    tokens: list[int]
    candidates: Tensor  # (C,) tokens that could be drawn
    q: list[Tensor]  # (C,) each: their probabilities; none if greedy


class _Candidates:
    """The tokens (C,) that may be drafted, and their rows (C, width) of the vocabulary matrix."""

    def __init__(self, vocabulary: Tensor, shortlist: int | None):
        self.vocabulary = vocabulary
        self.first = len(vocabulary) if shortlist is None else min(shortlist, len(vocabulary))
        self.tokens = torch.arange(self.first, device=vocabulary.device)
        self.weight = vocabulary[: self.first]
        self.rare: set[int] = set()

    def add(self, tokens: Sequence[int]) -> None:
        """Also those of `tokens`."""
        new = {int(token) for token in tokens if token >= self.first} - self.rare
        if new:
            self.rare |= new
            more = torch.tensor(sorted(new), device=self.tokens.device)
            self.tokens = torch.cat([self.tokens, more])
            self.weight = torch.cat([self.weight, self.vocabulary[more]])
