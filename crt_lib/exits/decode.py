"""Text from a model: with exits, with caches, greedy or sampled, several texts at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.cached.memory import Memory
from crt_lib.cached.products import wide_on_cpu
from crt_lib.cached.step import Step, Window
from crt_lib.data import check_counts, check_ids
from crt_lib.exits.policy import Policy, leave
from crt_lib.exits.scoring import evaluating
from crt_lib.files import InputError
from crt_lib.model import CRT


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default takes the most probable."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # only the k most probable tokens
    top_p: float = 1.0  # only the fewest most probable that hold this much probability
    never: tuple[int, ...] = ()  # tokens that are not written

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it must be a number, at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits (..., V), -inf at what is never written; InputError if nothing is left."""
        if not self.never:
            return logits
        words = logits.shape[-1]
        if len({*self.never}) >= words or not all(0 <= token < words for token in self.never):
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
    """A sample from each row of weights (B, V), (B,): by one number, where torch draws V.

    Raises InputError for weights of which none can be drawn, as where logits are no numbers.
    """
    upto = p.double().cumsum(-1)
    if not ((upto[:, -1] > 0) & (upto[:, -1] < math.inf)).all():
        raise InputError("no token can be drawn: the model's probabilities are not numbers, or 0")
    at = torch.rand(len(p), 1, dtype=upto.dtype, generator=generator, device=p.device)
    # it is below 1, so that rounding does not bring it up to the sum
    return torch.searchsorted(upto, at * upto[:, -1:], right=True)[:, 0]


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
    ids, starts = beside_each_other(model, prompts, new_tokens, policy, sampling, seed)
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


def beside_each_other(
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
