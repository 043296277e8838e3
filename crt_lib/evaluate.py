"""Loss, perplexity and bits per byte of every exit, under the two protocols.

honest: packed windows; every token of the text is scored exactly once, padding never; sums over
tokens, then one division. released: lines over 50 characters, cut or padded, padding scored, mean
of batch means.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import Settings
from crt_lib.data import NOT_SCORED, Batch, check_counts, evaluation_lines, evaluation_windows
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
        words, in_bytes = self.words, self.original_bytes
        return [
            {
                **labels,
                "protocol": self.protocol,
                "exit": loop,
                "tokens": self.tokens,
                "words": words,
                "bytes": in_bytes,
                "loss": loss,
                "token_ppl": exp(loss),
                "word_ppl": exp(loss * self.tokens / words) if words else None,
                "bits_per_byte": loss * self.tokens / math.log(2) / in_bytes if in_bytes else None,
            }
            for loop, loss in self.loss.items()
        ]


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
    most = {"max_tokens": max_tokens, "max_lines": max_lines}
    check_counts(0, 2**31 - 1, eot_id=eot_id, **{k: n for k, n in most.items() if n is not None})
    if protocol == "released":
        if stride is not None or max_tokens is not None:
            raise InputError("the released protocol has no stride and counts lines, not tokens")
        rows = evaluation_lines(split.lines[:max_lines], seq_len, batch_size, eot_id)
        parts = [sum_losses(model, [batch]) for batch in rows]
        if not parts:
            raise InputError("the released protocol scores lines over 50 characters; there is none")
        means = {k: float(np.mean([total[k] / n for total, n in parts])) for k in parts[0][0]}
        return Evaluation("released", means, sum(n for _, n in parts))
    if protocol != "honest":
        raise InputError(f"protocol is {protocol!r}; choose 'honest' or 'released'")
    ids = split.ids if max_tokens is None else split.ids[:max_tokens]
    windows = evaluation_windows(ids, seq_len, batch_size, eot_id, stride)
    total, tokens = sum_losses(model, windows)
    whole = len(ids) == len(split.ids)
    return Evaluation(
        protocol="honest",
        loss={loop: nll / tokens for loop, nll in total.items()},
        tokens=tokens,
        words=split.n_words if whole else None,
        original_bytes=split.n_bytes if whole else None,
    )


@torch.inference_mode()
def token_losses(model: Model, inputs: Tensor, targets: Tensor) -> dict[int, Tensor]:
    """The loss in nats of every target (B, T) at every exit, zero where the target is -100."""
    if isinstance(getattr(model, "config", None), Settings):  # a model of ours
        return model(inputs, targets=targets, reduction="none")
    losses = {}
    for loop, logits in logits_of(model, inputs).items():
        flat = at_least_float32(logits).flatten(0, 1)
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=NOT_SCORED, reduction="none")
        losses[loop] = loss.view(targets.shape)
    return losses


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


def sum_losses(model: Model, batches: Iterable[Batch]) -> tuple[dict[int, float], int]:
    """The summed losses by exit, in nats, and how many targets they are of; InputError for none."""
    total: dict[int, float] = {}
    tokens = 0
    for losses, targets in losses_of(model, batches):
        tokens += int((targets != NOT_SCORED).sum())
        for loop, loss in losses.items():
            total[loop] = total.get(loop, 0.0) + loss.double().sum().item()
    if tokens == 0:
        raise InputError("there is nothing to score: the text has no tokens")
    return total, tokens


def losses_of(model: Model, batches: Iterable[Batch]) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Of each batch the losses (B, T) by exit, and the targets; the model evaluates meanwhile."""
    device = device_of(model)
    parts = [*model.modules()] if isinstance(model, nn.Module) else []
    trained = [part for part in parts if part.training]
    if trained:
        parts[0].eval()
    try:
        for batch in batches:
            targets = batch.targets.to(device)
            yield token_losses(model, batch.inputs.to(device), targets), targets
    finally:
        for part in trained:
            part.training = True


def exp(nats: float) -> float:
    """A perplexity; infinite where a float is too small for it."""
    return math.exp(nats) if nats < 700 else math.inf
