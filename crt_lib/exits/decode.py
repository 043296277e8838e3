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
from torch import Tensor, nn

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import wide_on_cpu
from crt_lib.cached.step import Step, Window
from crt_lib.data import check_counts, check_ids
from crt_lib.exits.policy import Policy, leave, run_with_exits
from crt_lib.exits.scoring import evaluating
from crt_lib.files import InputError
from crt_lib.model import CRT

# tokens of a draft at most, greedy and sampled; nats that a greedy one is sure by; tokens that may
# always be drafted. The first three chosen on valid, by `crt bench drafts` of results/demo
LONGEST, DRAWN, SURE, SHORTLIST = 16, 2, 0.7, 2048


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default takes the most probable."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # only the k most probable tokens
    top_p: float = 1.0  # only the fewest most probable that hold this much probability
    never: tuple[int, ...] = ()  # tokens that are not written

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits (..., V), -inf at what is never written; InputError if nothing is left."""
        if not self.never:
            return logits
        words = logits.shape[-1]
        if not set(self.never) < set(range(words)):
            raise InputError(f"never {self.never} is to leave some of tokens 0 to {words - 1}")
        return logits.index_fill(-1, torch.tensor(self.never, device=logits.device), -torch.inf)

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
    after the prompt. `each` is called with every row's new token. Raises InputError for prompts
    empty, too long or of other tokens, a model that sees the future, and 8 bits not to be had.
    """
    policy, sampling = policy or Policy(), sampling or Sampling()
    if quantize is not None and not cache:
        raise InputError("int8 weights are read with a cache; leave cache on")
    ids, starts = _beside_each_other(model, prompts, new_tokens, policy, sampling, seed)
    rows, room, step = len(ids), ids.shape[1] + new_tokens, None
    generator = torch.Generator(ids.device).manual_seed(seed)
    texts = [Generated([], []) for _ in prompts]
    with evaluating(model):
        for _ in range(new_tokens):
            if step is not None:
                exited = leave(step, ids[:, -1], policy)
            else:  # the prompt, and without a cache everything again
                memory = Memory(model.config, rows, room, model.loop_encoding, starts)
                exited = leave(Window(model, memory, last=True), ids, policy)
                if cache and (new_tokens > 1 or quantize is not None):
                    step = Step(model, memory, quantize)
            logits = sampling.allowed(exited.logits.view(rows, -1))
            chosen = sampling.choose(logits, generator)  # (B,)
            ids = chosen[:, None] if cache else torch.cat([ids, chosen[:, None]], 1)
            new, loops = chosen.tolist(), exited.loops.view(rows, -1)[:, -1].tolist()
            for text, token, loop in zip(texts, new, loops, strict=True):
                if not text.tokens or text.tokens[-1] != stop:
                    text.tokens.append(token)
                    text.loops.append(loop)
            if each is not None:
                each(new)
            if all(text.tokens[-1] == stop for text in texts):
                break
    return texts


def _beside_each_other(
    model: CRT,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    policy: Policy,
    sampling: Sampling,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """The prompts (B, longest), padded on the left; where each starts (B,), if any is shorter.

    Raises InputError as `generate` does.
    """
    for given, kind in ((model, CRT), (policy, Policy), (sampling, Sampling)):
        if not isinstance(given, kind):
            raise InputError(f"give a {kind.__name__}, not a {type(given).__name__}")
    check_counts(-(2**63), 2**63 - 1, seed=seed)
    check_counts(0, model.config.max_seq_len, new_tokens=new_tokens)
    try:
        rows = [torch.as_tensor(prompt) for prompt in prompts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"prompts are lists of token ids, not {prompts!r:.60}") from error
    if not rows:
        raise InputError("no prompt was given")
    if any(row.ndim != 1 or (len(row) and row.is_floating_point()) for row in rows):
        raise InputError(f"prompts are lists of token ids, not {prompts!r:.60}")
    lengths = torch.tensor([len(row) for row in rows])
    longest, room = int(lengths.max()), model.config.max_seq_len
    if not lengths.all():
        raise InputError("a prompt is empty; begin with at least one token, as end-of-text")
    if longest + new_tokens > room:
        raise InputError(
            f"{longest} tokens of prompt and {new_tokens} new ones are more than the model's "
            f"{room} positions; shorten one of them"
        )
    whole = [row.to(torch.int64) for row in rows]
    ids = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_side="left")
    check_ids(ids, model.config)
    device = model.loop_encoding.device
    starts = (longest - lengths).to(device) if int(lengths.min()) < longest else None
    return ids.to(device), starts


@dataclass(frozen=True)
class Speculated(Generated):
    """Also what speculation did: of each verification, tokens drafted and tokens kept."""

    verified: list[tuple[int, int]]

    @property
    def drafted(self) -> int:
        """Tokens that were drafted."""
        return sum(drafted for drafted, _ in self.verified)

    @property
    def accepted(self) -> int:
        """Those of them that the full model kept."""
        return sum(kept for _, kept in self.verified)


@dataclass(frozen=True)
class Speculation:
    """Lossless decoding of one prompt: loops 1..`draft_loop` draft, the others verify.

    A greedy draft, of at most LONGEST tokens, ends where the best logit is not SURE ahead of the
    second; a sampled one has DRAWN. It is of the first SHORTLIST tokens of the vocabulary, in a
    trained BPE the most frequent, and of those that the text has had, so that it costs a part of a
    head. Raises InputError for no such exit.
    """

    model: CRT
    draft_loop: int

    def __post_init__(self) -> None:
        exits = self.model.config.exit_loops
        if self.draft_loop not in exits:
            raise InputError(
                f"loop {self.draft_loop} cannot draft; loops with a head before the last: {exits}"
            )

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
        sampling = sampling or Sampling()
        ids, _ = _beside_each_other(self.model, [prompt], new_tokens, Policy(), sampling, seed)
        tokens: list[int] = []
        verified: list[tuple[int, int]] = []
        longest = DRAWN if sampling.temperature else LONGEST
        with evaluating(self.model):
            text = _Text(self, ids, ids.shape[1] + new_tokens, sampling, seed)
            while len(tokens) < new_tokens and stop not in tokens:
                room = new_tokens - len(tokens) - 1  # one comes from verifying
                drafted, new = text.continued(min(longest, room))
                verified.append((drafted, len(new) - 1))
                tokens += new
                if each is not None:
                    each(new)
        if stop in tokens:
            tokens = tokens[: tokens.index(stop) + 1]
        return Speculated(tokens, [self.model.config.n_loops] * len(tokens), verified)


class _Text:
    """The text that a speculation continues: its memory, and the tokens that may be drafted."""

    def __init__(self, how: Speculation, ids: Tensor, capacity: int, sampling: Sampling, seed: int):
        model = self.model = how.model
        self.loop, self.sampling, self.waiting = how.draft_loop, sampling, ids[0, -1:]
        self.generator = torch.Generator(ids.device).manual_seed(seed)
        self.memory = Memory(model.config, 1, capacity, model.loop_encoding)
        if ids.shape[1] > 1:
            run_with_exits(model, ids[:, :-1], Policy(), self.memory, last=True)
        self.step = Step(model, self.memory)
        self.vocabulary = model.readout(self.loop, model.loop_encoding[None, :1])[1]
        allowed = sampling.allowed(torch.zeros(len(self.vocabulary), device=ids.device))
        (self.candidates,) = torch.where(allowed[:SHORTLIST] == 0)  # (C,)
        self.weight = self.vocabulary[self.candidates]  # (C, width)
        self.rare: set[int] = set()
        self._allow(ids[0].tolist())

    def continued(self, most: int) -> tuple[int, list[int]]:
        """How many tokens were drafted; the new ones: those that stay, and what comes next."""
        length, step, final = self.memory.length + 1, self.step, self.model.config.n_loops
        drafted: list[int] = []
        q: list[Tensor] = []  # what each was drawn by (C,), unless greedily
        passed = [self._first_loops(self.waiting)]
        for _ in range(most):
            features, _ = step.readout(self.loop, passed[-1][0])
            logits = F.linear(features, self.weight)
            if self.sampling.temperature == 0:
                chosen = best(logits)
                rest = logits.index_fill(1, chosen, -torch.inf)
                if float(logits.amax() - rest.amax()) < SURE:
                    break
            else:
                q.append(self.sampling.probabilities(logits)[0])
                chosen = draw(q[-1][None], self.generator)
            token = self.candidates[chosen]
            drafted.append(int(token))
            passed.append(self._first_loops(token))
        z = step.catch_up(self.loop, *(torch.cat(each) for each in zip(*passed, strict=True)))
        features, vocabulary = step.readout(final, z)
        new = self._verified(drafted, q, vocabulary(features))
        self._allow(new)
        self.memory.truncate(length + len(new) - 1)
        self.waiting = torch.tensor(new[-1:], device=self.waiting.device)  # not in the memory
        return len(drafted), new

    def _first_loops(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """The state (1, d) after the draft loop of a token (1,), and the embedding it came from."""
        z = self.step.begin(token)
        for loop in range(1, self.loop + 1):
            z = self.step.loop(loop, z)
        self.step.end(self.loop, settle=False)
        return z, self.step.embedded

    def _verified(self, drafted: list[int], q: list[Tensor], logits: Tensor) -> list[int]:
        """The drafted tokens that stay, and the next; logits (drafted + 1, V) of the last loop."""
        sampling, kept = self.sampling, 0
        logits = sampling.allowed(logits)
        if sampling.temperature == 0:
            wanted = best(logits).tolist()
            while kept < len(drafted) and drafted[kept] == wanted[kept]:
                kept += 1
            return wanted[: kept + 1]
        p = sampling.probabilities(logits)
        for own, token, drawn in zip(p, drafted, q, strict=False):
            spread = torch.zeros_like(own).index_add(0, self.candidates, drawn)
            if (
                torch.rand((), generator=self.generator, device=p.device)
                >= own[token] / spread[token]
            ):
                rest = (own - spread).clamp(min=0)
                # none for rounding: the two are equal
                last = draw((rest if rest.any() else own)[None], self.generator)
                break
            kept += 1
        else:
            last = draw(p[-1:], self.generator)
        return [*drafted[:kept], int(last)]

    def _allow(self, tokens: Sequence[int]) -> None:
        """Also those of `tokens` may be drafted."""
        new = {token for token in tokens if token >= SHORTLIST} - self.rare
        new -= set(self.sampling.never)
        if new:
            self.rare |= new
            more = torch.tensor(sorted(new), device=self.candidates.device)
            self.candidates = torch.cat([self.candidates, more])
            self.weight = torch.cat([self.weight, self.vocabulary[more]])
