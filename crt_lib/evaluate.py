"""Loss, perplexity and bits per byte of every exit, under the two protocols.

honest: packed windows; every token of the text is scored exactly once, padding never; sums over
tokens, then one division. released: lines over 50 characters, cut or padded, padding scored, mean
of batch means. Deployable: each token predicted with nothing after it in the input.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import Settings
from crt_lib.data import NOT_SCORED, Batch, evaluation_lines, evaluation_windows
from crt_lib.files import InputError
from crt_lib.loss import at_least_float32

if TYPE_CHECKING:
    from crt_lib.text.tokenizer import TokenSplit

RELEASED_SEQ_LEN = 384  # positions a line is cut or padded to
Protocol = Literal["honest", "released"]
Model = nn.Module | Callable[..., Any]  # ids (B, T) to logits, as `logits_of` reads them


@dataclass(frozen=True)
class Evaluation:
    """What was scored, and the loss of each exit.

    `loss` maps an exit loop to nats a token (a model without exits has the one key 0). `tokens` is
    the number of targets scored; `words` and `original_bytes` are those of the text they came from,
    None where the scored tokens are not the whole of a text.
    """

    protocol: str
    loss: dict[int, float]
    tokens: int
    words: int | None = None
    original_bytes: int | None = None

    def rows(self, **labels: Any) -> list[dict[str, Any]]:
        """A row an exit: loss and token PPL; word PPL exp(nll / words) and bits per byte."""
        rows = []
        for loop, loss in self.loss.items():
            nll = loss * self.tokens
            per_word = exp(nll / self.words) if self.words else None
            per_byte = nll / math.log(2) / self.original_bytes if self.original_bytes else None
            rows.append(
                {
                    **labels,
                    "protocol": self.protocol,
                    "exit": loop,
                    "tokens": self.tokens,
                    "words": self.words,
                    "bytes": self.original_bytes,
                    "loss": loss,
                    "token_ppl": exp(loss),
                    "word_ppl": per_word,
                    "bits_per_byte": per_byte,
                }
            )
        return rows


def evaluate(
    model: Model,
    split: "TokenSplit",
    eot_id: int,
    *,
    protocol: Protocol = "honest",
    seq_len: int = RELEASED_SEQ_LEN,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    max_lines: int | None = None,
) -> Evaluation:
    """Score a split at every exit at once, on the model's device, in evaluation mode.

    `model`: a CRT, or anything that `logits_of` reads.
    `seq_len` positions a window (384 is the released length of a line); with `stride` < seq_len
    honest windows overlap, and a token is scored with at least seq_len - stride tokens of context.
    `max_tokens`: only the first so many tokens (honest protocol), with no words or bytes to report;
    `max_lines`: only the first so many lines (released protocol).
    Raises InputError for an unknown protocol or an empty split.
    """
    if protocol == "released":
        if stride is not None or max_tokens is not None:
            raise InputError("the released protocol has no stride and counts lines, not tokens")
        rows = evaluation_lines(split.lines[:max_lines], seq_len, batch_size, eot_id)
        return _evaluate_released(model, rows)
    if protocol != "honest":
        raise InputError(f"protocol is {protocol!r}; choose 'honest' or 'released'")
    ids = split.ids if max_tokens is None else split.ids[:max_tokens]
    windows = evaluation_windows(ids, seq_len, batch_size, eot_id, stride)
    total, tokens = _sum_losses(model, windows)
    whole = len(ids) == len(split.ids)
    return Evaluation(
        protocol="honest",
        loss={loop: nll / tokens for loop, nll in total.items()},
        tokens=tokens,
        words=split.n_words if whole else None,
        original_bytes=split.n_bytes if whole else None,
    )


def evaluate_lines(
    model: Model,
    lines: Sequence[np.ndarray],
    eot_id: int,
    *,
    score_padding: bool,
    seq_len: int = RELEASED_SEQ_LEN,
    batch_size: int = 8,
) -> Evaluation:
    """Score padded lines by sums over tokens, with or without the padding.

    The second column of the 2 x 2 table (symmetric or causal x padding scored or not).
    """
    rows = evaluation_lines(lines, seq_len, batch_size, eot_id, score_padding)
    total, tokens = _sum_losses(model, rows)
    return Evaluation("lines", {loop: nll / tokens for loop, nll in total.items()}, tokens)


def evaluate_deployable(
    model: Model,
    ids: np.ndarray,
    eot_id: int,
    *,
    seq_len: int = 64,
    windows: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Score sampled windows a token at a time, each with nothing after it in the input.

    Position t of a window is predicted from a row that ends at t, so a model that looks ahead finds
    nothing there. A causal model gets the loss it has on the whole window. Costs about
    windows * seq_len**2 / 2 positions. Raises InputError when `ids` is shorter than a window.
    """
    if len(ids) <= seq_len:
        raise InputError(f"{len(ids)} tokens are fewer than a window of {seq_len} and its target")
    starts = np.random.default_rng(seed).integers(0, len(ids) - seq_len, windows)
    rows = torch.from_numpy(np.stack([ids[s : s + seq_len + 1] for s in starts]).astype(np.int64))

    def prefixes() -> Iterable[Batch]:
        for t in range(1, seq_len + 1):
            targets = torch.full((windows, t), NOT_SCORED)
            targets[:, -1] = rows[:, t]
            yield Batch(rows[:, :t], targets)

    total, tokens = _sum_losses(model, prefixes())
    return Evaluation("deployable", {loop: nll / tokens for loop, nll in total.items()}, tokens)


@torch.inference_mode()
def token_losses(model: Model, inputs: Tensor, targets: Tensor) -> dict[int, Tensor]:
    """The loss in nats of every target (B, T) at every exit, zero where the target is -100."""
    if isinstance(getattr(model, "config", None), Settings):  # a model of ours
        return model(inputs, targets=targets, reduction="none")
    return {
        loop: F.cross_entropy(
            at_least_float32(logits).flatten(0, 1),
            targets.flatten(),
            ignore_index=NOT_SCORED,
            reduction="none",
        ).view(targets.shape)
        for loop, logits in logits_of(model, inputs).items()
    }


def logits_of(model: Model, ids: Tensor, **labels: Tensor) -> dict[int, Tensor]:
    """Logits (B, T, V) by exit of anybody's model, 0 for a model without exits.

    `model` gives them as they are, as `{exit: logits}`, as an object's `.logits`, or as what has
    three dimensions in a tuple.
    """
    output = model(ids, **labels)
    if isinstance(output, dict) and output and all(isinstance(key, int) for key in output):
        return output
    if type(output) is tuple:
        output = next((x for x in output if torch.is_tensor(x) and x.ndim == 3), output)
    return {0: getattr(output, "logits", output)}


def device_of(model: Model) -> torch.device:
    """That of its parameters; the CPU for a function."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.device for p in parameters), torch.device("cpu"))


def _evaluate_released(model: Model, rows: Iterable[Batch]) -> Evaluation:
    means: dict[int, list[float]] = {}
    tokens = 0
    for losses, targets in _losses(model, rows):
        scored = int((targets != NOT_SCORED).sum())
        tokens += scored
        for loop, loss in losses.items():
            means.setdefault(loop, []).append(loss.double().sum().item() / scored)
    if not means:
        raise InputError("the released protocol scores lines over 50 characters; there is none")
    return Evaluation("released", {loop: float(np.mean(m)) for loop, m in means.items()}, tokens)


def _sum_losses(model: Model, batches: Iterable[Batch]) -> tuple[dict[int, float], int]:
    total: dict[int, float] = {}
    tokens = 0
    for losses, targets in _losses(model, batches):
        tokens += int((targets != NOT_SCORED).sum())
        for loop, loss in losses.items():
            total[loop] = total.get(loop, 0.0) + loss.double().sum().item()
    if tokens == 0:
        raise InputError("there is nothing to score: the text has no tokens")
    return total, tokens


def scored_losses(
    model: Model, batches: Iterable[Batch]
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Of each batch the losses (B, T) by exit, and which of them count, in order of the text."""
    for losses, targets in _losses(model, batches):
        yield losses, targets != NOT_SCORED


def _losses(model: Model, batches: Iterable[Batch]):
    """(losses by exit, targets) of each batch, the model in evaluation mode meanwhile."""
    device = device_of(model)
    trained = model if isinstance(model, nn.Module) and model.training else None
    if trained is not None:
        trained.eval()
    try:
        for batch in batches:
            targets = batch.targets.to(device)
            yield token_losses(model, batch.inputs.to(device), targets), targets
    finally:
        if trained is not None:
            trained.train()


def exp(nats: float) -> float:
    """A perplexity; infinite where a float is too small for it."""
    return math.exp(nats) if nats < 700 else math.inf
