"""Lossless speculation, one text at a time: tokens are drafted, and all verified in one pass.

Either an early exit drafts, and the deeper loops verify from its states, which are exact (Elhoushi
et al. 2024, arXiv:2404.16710); or the text so far does, by what followed its last tokens before
(prompt lookup, Saxena 2023). Greedy text is that of plain decoding; sampled text has its
distribution (Leviathan et al. 2023, arXiv:2211.17192).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.exits.decode import Each, Generated, Sampling, beside_each_other, best, draw
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.exits.scoring import evaluating
from crt_lib.files import InputError
from crt_lib.model import CRT

# The first four were chosen on valid, for `results/demo`.
LONGEST = 16  # tokens of a draft
DRAWN = 2  # of one that an exit samples
SURE = 0.7  # nats that the best token of a greedy exit is ahead of the second
GROWS = 3  # times what was kept of the one before has a draft by the text so far, at least two
SHORTLIST = 2048  # tokens that an exit may always draft


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
    second; a sampled one has DRAWN. So that it costs a part of a head, it is of the first SHORTLIST
    tokens, in a trained BPE the most frequent, and of those that the text has had.

    With `draft_loop` 0 no loop drafts. What followed the last two tokens before is the draft, or
    else what followed the last one. All loops verify, or those up to `last`, whose text it then is.
    Raises InputError for no such exit.
    """

    model: CRT
    draft_loop: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        exits, final = self.model.config.exit_loops, self.model.config.n_loops
        if self.draft_loop not in (0, *exits):
            raise InputError(
                f"loop {self.draft_loop} cannot draft; loops with a head before the last: {exits}"
            )
        if self.last not in (None, final) and (self.draft_loop or self.last not in exits):
            who = f"loop {self.draft_loop}" if self.draft_loop else "the text"
            exits = () if self.draft_loop else exits
            raise InputError(
                f"loop {self.last} cannot be the last where {who} drafts; it is one of "
                f"{(*exits, final)}"
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
        ids, _ = beside_each_other(self.model, [prompt], new_tokens, Policy(), sampling, seed)
        tokens: list[int] = []
        verified: list[tuple[int, int]] = []
        kind = _DraftedByExit if self.draft_loop else _DraftedByText
        with evaluating(self.model):
            text = kind(self, ids, ids.shape[1] + new_tokens, sampling, seed)
            while len(tokens) < new_tokens and stop not in tokens:
                # one token comes from verifying
                drafted, new = text.continued(new_tokens - len(tokens) - 1)
                if stop in new:
                    new = new[: new.index(stop) + 1]
                verified.append((drafted, len(new) - 1))
                tokens += new
                if each is not None:
                    each(new)
        return Speculated(tokens, [text.last] * len(tokens), verified)


class _Text(ABC):
    """The text that a speculation continues, and its memory, which lacks the token `waiting`."""

    def __init__(self, how: Speculation, ids: Tensor, capacity: int, sampling: Sampling, seed: int):
        model = self.model = how.model
        self.loop, self.sampling, self.waiting = how.draft_loop, sampling, ids[0, -1:]
        self.last = how.last or model.config.n_loops
        self.generator = torch.Generator(ids.device).manual_seed(seed)
        self.memory = Memory(model.config, 1, capacity, model.loop_encoding)
        if ids.shape[1] > 1:
            run_with_exits(model, ids[:, :-1], Policy(fixed=self.last), self.memory, last=True)
        self.step = Step(model, self.memory)
        self.note(ids[0].tolist())

    @abstractmethod
    def note(self, new: Sequence[int]) -> None:
        """Tokens that the text has got."""

    @abstractmethod
    def draft(self, most: int) -> tuple[list[int], list[Tensor], Tensor]:
        """At most `most` tokens; unless greedily, the distribution (V,) that each was drawn from;
        and the states after loop `last` of the one that waits and of these, (n, d).
        """

    def continued(self, most: int) -> tuple[int, list[int]]:
        """How many tokens were drafted; the new ones: those that stay, and what comes next."""
        length = self.memory.length + 1
        drafted, q, z = self.draft(most)
        features, vocabulary = self.step.readout(self.last, z)
        new = self._verified(drafted, q, vocabulary(features))
        self.note(new)
        self.memory.truncate(length + len(new) - 1)
        self.waiting = torch.tensor(new[-1:], device=self.waiting.device)
        return len(drafted), new

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
            if (
                torch.rand((), generator=self.generator, device=p.device)
                >= own[token] / drawn[token]
            ):
                rest = (own - drawn).clamp(min=0)
                # none for rounding: the two are equal
                last = draw((rest if rest.any() else own)[None], self.generator)
                break
            kept += 1
        else:
            last = draw(p[-1:], self.generator)
        return [*drafted[:kept], int(last)]


class _DraftedByExit(_Text):
    def __init__(self, how: Speculation, ids: Tensor, capacity: int, sampling: Sampling, seed: int):
        like = how.model.loop_encoding[None, :1]
        self.vocabulary = how.model.readout(how.draft_loop, like)[1]
        allowed = sampling.allowed(torch.zeros(len(self.vocabulary), device=ids.device))
        (self.candidates,) = torch.where(allowed[:SHORTLIST] == 0)  # (C,)
        self.weight = self.vocabulary[self.candidates]  # (C, width)
        self.rare: set[int] = set()
        super().__init__(how, ids, capacity, sampling, seed)

    def note(self, new: Sequence[int]) -> None:
        more = {token for token in new if token >= SHORTLIST} - self.rare
        more -= set(self.sampling.never)
        if more:
            self.rare |= more
            which = torch.tensor(sorted(more), device=self.candidates.device)
            self.candidates = torch.cat([self.candidates, which])
            self.weight = torch.cat([self.weight, self.vocabulary[which]])

    def draft(self, most: int) -> tuple[list[int], list[Tensor], Tensor]:
        drafted: list[int] = []
        q: list[Tensor] = []
        passed = [self._first_loops(self.waiting)]
        longest = DRAWN if self.sampling.temperature else LONGEST
        for _ in range(min(most, longest) if len(self.candidates) else 0):
            features, _ = self.step.readout(self.loop, passed[-1][0])
            logits = F.linear(features, self.weight)
            if self.sampling.temperature == 0:
                chosen = best(logits)
                rest = logits.index_fill(1, chosen, -torch.inf)
                if float(logits.amax() - rest.amax()) < SURE:
                    break
            else:
                drawn = self.sampling.probabilities(logits)
                spread = drawn.new_zeros(len(self.vocabulary))
                q.append(spread.index_add_(0, self.candidates, drawn[0]))
                chosen = draw(drawn, self.generator)
            token = self.candidates[chosen]
            drafted.append(int(token))
            passed.append(self._first_loops(token))
        z, embedded = (torch.cat(each) for each in zip(*passed, strict=True))
        return drafted, q, self.step.catch_up(self.loop, z, embedded)

    def _first_loops(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """The state (1, d) after the draft loop of a token (1,), and the embedding it came from."""
        z = self.step.begin(token)
        for loop in range(1, self.loop + 1):
            z = self.step.loop(loop, z)
        self.step.end(self.loop, settle=False)
        return z, self.step.embedded


class _DraftedByText(_Text):
    def __init__(self, how: Speculation, ids: Tensor, capacity: int, sampling: Sampling, seed: int):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # one token or two -> where what followed is
        self.tried, self.kept = 0, 1  # of the last draft
        super().__init__(how, ids, capacity, sampling, seed)

    def note(self, new: Sequence[int]) -> None:
        if self.tried:
            self.kept = len(new) - 1
        for token in new:
            for n in (1, 2):
                self.after[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def draft(self, most: int) -> tuple[list[int], list[Tensor], Tensor]:
        text, drafted = self.tokens, list[int]()
        at = self.after.get(tuple(text[-2:]), self.after.get(tuple(text[-1:])))
        if at is not None:
            for i in range(at, at + min(most, LONGEST, max(2, GROWS * self.kept))):
                drafted.append(text[i] if i < len(text) else drafted[i - len(text)])
        self.tried = len(drafted)
        ids = torch.tensor(drafted, dtype=torch.int64, device=self.waiting.device)
        q: list[Tensor] = []
        if self.sampling.temperature:
            q += F.one_hot(ids, self.model.config.vocab_size).float()
        return drafted, q, self.step.read(torch.cat([self.waiting, ids]), self.last)
