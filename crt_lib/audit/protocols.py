"""What a score is made of: tokens with nothing after them, padding, and the entropy of a text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crt_lib.audit.compare import document_of_tokens, score_documents
from crt_lib.data import NOT_SCORED, Batch, evaluation_lines
from crt_lib.evaluate import Evaluation, Model, exp, sum_losses
from crt_lib.files import InputError
from crt_lib.text import grammar
from crt_lib.text.tokenizer import TokenizedCorpus

PROOF = 4.0  # standard errors below the floor that count as proof


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

    Position t of a window is predicted from a row that ends at t: a causal model gets the loss it
    has on the whole window. Raises InputError when `ids` is shorter than a window.
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

    total, tokens = sum_losses(model, prefixes())
    return Evaluation("deployable", {loop: nll / tokens for loop, nll in total.items()}, tokens)


@dataclass(frozen=True)
class PaddingReport:
    """The same lines, three ways: nats a scored position by exit.

    `scored`: rows of one length, the padding scored too; `ignored`: the padding is there but not
    scored; `absent`: each line in a row of its own length.
    """

    share: float  # of the scored positions that are padding
    scored: dict[int, float]
    ignored: dict[int, float]
    absent: dict[int, float]

    def __str__(self) -> str:
        lines = [f"padding is {self.share:.1%} of the scored positions"]
        lines.append(f"{'exit':>4}{'PPL, padding scored':>21}{'ignored':>12}{'absent':>12}")
        for loop in self.scored:
            ppl = [exp(way[loop]) for way in (self.scored, self.ignored, self.absent)]
            lines.append(f"{loop:>4}{ppl[0]:>21,.2f}{ppl[1]:>12,.2f}{ppl[2]:>12,.2f}")
        return "\n".join(lines)


def padding_report(
    model: Model, lines: Sequence[np.ndarray], eot_id: int, *, seq_len: int = 384
) -> PaddingReport:
    """What scoring padding does to the perplexity of `model` on tokenized `lines`.

    Lines are cut or padded to `seq_len` with `eot_id`, the next token scored at each position.
    Raises InputError when there is nothing to score.
    """
    ways: dict[str, Iterable[Batch]] = {
        "scored": evaluation_lines(lines, seq_len, 8, eot_id),
        "ignored": evaluation_lines(lines, seq_len, 8, eot_id, score_padding=False),
        "absent": (
            batch
            for line in lines
            if len(line) > 1  # else no token has one before it
            for batch in evaluation_lines([line], min(len(line), seq_len), 1, eot_id)
        ),
    }
    found, tokens = {}, {}
    for way, batches in ways.items():
        nll, tokens[way] = sum_losses(model, batches)
        found[way] = {loop: total / tokens[way] for loop, total in nll.items()}
    return PaddingReport(1 - tokens["ignored"] / tokens["scored"], **found)


@dataclass(frozen=True)
class EntropyReport:
    """Nats a word on text of `grammar`, which no causal model can score below its entropy."""

    rate: float  # the entropy rate: the floor of all texts
    own: float  # what the grammar itself gives this text: its floor
    above: dict[int, float]  # by exit, the mean difference from `own` over sentences
    error: dict[int, float]  # its standard error

    @property
    def leaks(self) -> bool:
        """Whether an exit is below the floor by `PROOF` standard errors: proof of a leak."""
        return any(self.above[loop] < -PROOF * self.error[loop] for loop in self.above)


def entropy_floor(
    model: Model, data: TokenizedCorpus, split: str = "test", *, seq_len: int = 64
) -> EntropyReport:
    """Hold a model's score on `grammar` against what the grammar itself gives the same sentences.

    Sentences are independent, so in the mean a model loses at least as much on one as the grammar.
    Raises InputError for another corpus, and as `document_of_tokens`.
    """
    if data.corpus.name != "grammar":
        raise InputError(f"only the entropy of grammar is known, not that of {data.corpus.name}")
    document_of_tokens(data, split)  # or an error
    sentences = data.corpus.documents(split)
    scored = score_documents(model, data, split, seq_len)
    floor = np.array([-grammar.log_prob(sentence) for sentence in sentences])
    words = np.array([len(sentence.split()) + 1 for sentence in sentences])  # and the line end
    above, error = {}, {}
    for loop, nll in scored.nll.items():
        excess = nll - floor
        above[loop] = float(excess.sum() / words.sum())
        spread = (excess - above[loop] * words).std(ddof=1)
        error[loop] = float(spread * len(words) ** 0.5 / words.sum())
    return EntropyReport(grammar.entropy_rate(), float(floor.sum() / words.sum()), above, error)
