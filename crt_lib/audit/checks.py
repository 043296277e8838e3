"""What a language model's numbers are made of: leaks, padding, heads nobody counts, tied weights.

Every report takes a `CRT`, a causal language model of transformers, or (that of parameters apart)
any callable from token ids (B, T) to logits (B, T, V), and prints as one table.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crt_lib.audit.accounting import multiply_adds, parameters_by_part
from crt_lib.audit.causality import CausalityReport, causality_report
from crt_lib.audit.compare import score_documents
from crt_lib.audit.probes import Finding
from crt_lib.audit.protocols import evaluate_lines
from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.evaluate import Model, device_of, exp, logits_of
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.text import grammar
from crt_lib.text.tokenizer import TokenizedCorpus

__all__ = [
    "CausalityReport",
    "EntropyReport",
    "Finding",
    "PaddingReport",
    "ParameterReport",
    "SpeedReport",
    "causality_report",
    "entropy_floor",
    "padding_report",
    "parameter_report",
    "speed_report",
]
PROOF = 4.0  # standard errors below the floor that count as proof


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
    scored = evaluate_lines(model, lines, eot_id, score_padding=True, seq_len=seq_len)
    ignored = evaluate_lines(model, lines, eot_id, score_padding=False, seq_len=seq_len)
    nll: dict[int, float] = {}
    tokens = 0
    for line in lines:
        length = min(len(line), seq_len)
        if length < 2:  # no token has one before it
            continue
        own = evaluate_lines(model, [line], eot_id, score_padding=False, seq_len=length)
        tokens += own.tokens
        for loop, loss in own.loss.items():
            nll[loop] = nll.get(loop, 0.0) + loss * own.tokens
    absent = {loop: total / tokens for loop, total in nll.items()}
    return PaddingReport(1 - ignored.tokens / scored.tokens, scored.loss, ignored.loss, absent)


@dataclass(frozen=True)
class SpeedReport:
    """A row an exit, the last one the whole model; a model without exits has the one row 0.

    `claimed`: loops of the whole model over its own, which is what counting loops gives.
    `multiply_adds`: a token, by the formula, its one head included (None where there is none);
    `counted`: by torch; `with_heads`: by the formula, when each exit on the way asks its head.
    `seconds`: of a forward pass, the median.
    """

    positions: int
    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        head = ("exit", "loops", "claimed", "multiply-adds", "by torch", "ratio", "asking heads")
        lines = ["".join(f"{name:>14}" for name in (*head, "ms", "measured"))]
        whole = self.rows[-1]
        for row in self.rows:
            ours, asking = row["multiply_adds"], row["with_heads"]
            cells = (
                str(row["exit"]),
                _cell(row["loops"], "d"),
                _cell(row["claimed"], ".2f", "x"),
                _cell(ours and ours / 1e6, ".2f", "M"),
                _cell(row["counted"] / 1e6, ".2f", "M"),
                _cell(ours and whole["multiply_adds"] / ours, ".2f", "x"),
                _cell(asking and whole["multiply_adds"] / asking, ".2f", "x"),
                _cell(row["seconds"] * 1e3, ".1f"),
                _cell(whole["seconds"] / row["seconds"], ".2f", "x"),
            )
            lines.append("".join(f"{cell:>14}" for cell in cells))
        return "\n".join([*lines, f"forward passes over {self.positions} positions"])


def _cell(value: float | None, how: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{how}}{unit}"


@torch.inference_mode()
def speed_report(
    model: Model, vocab_size: int, *, seq_len: int = 64, repeats: int = 5
) -> SpeedReport:
    """Loops claimed, multiply-adds counted twice, and time: a pass to each exit of `model`.

    The passes take turns, `repeats` rounds. torch's counter sees matrix products and convolutions;
    the depthwise taps, written as products of tensors, are only in the formula.
    """
    ids = torch.randint(vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device_of(model))
    passes: dict[int, Any] = {0: lambda: logits_of(model, ids)}
    config = getattr(model, "config", None)
    if isinstance(model, CRT):
        exits = model.config.head_loops
        passes = {loop: functools.partial(model, ids, exits=(loop,)) for loop in exits}
    module = model if isinstance(model, nn.Module) else None
    was_training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        counted = {}
        for loop, run in passes.items():
            # the fused kernel of attention is not among those that torch counts on a CPU
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            counted[loop] = counter.get_total_flops() / 2 / seq_len
        seconds: dict[int, list[float]] = {loop: [] for loop in passes}
        for _ in range(repeats):
            for loop, run in passes.items():
                started = time.perf_counter()
                run()
                if ids.is_cuda:
                    torch.cuda.synchronize()
                seconds[loop].append(time.perf_counter() - started)
    finally:
        if module is not None:
            module.train(was_training)
    rows = []
    for loop in passes:
        row: dict[str, Any] = dict.fromkeys(("loops", "claimed", "multiply_adds", "with_heads"))
        if isinstance(config, ModelConfig):
            before = tuple(own for own in config.head_loops if own <= loop)
            row["loops"], row["claimed"] = loop, config.n_loops / loop
            row["multiply_adds"] = sum(multiply_adds(config, seq_len, (loop,)).values())
            row["with_heads"] = sum(multiply_adds(config, seq_len, before).values())
        elif isinstance(config, GPT2Config):
            row["multiply_adds"] = sum(multiply_adds(config, seq_len).values())
        timed = {"counted": counted[loop], "seconds": float(np.median(seconds[loop]))}
        rows.append({"exit": loop, **row, **timed})
    return SpeedReport(seq_len, tuple(rows))


@dataclass(frozen=True)
class ParameterReport:
    """Parameters by part, each counted once; `untied`: the total if each use had its own.

    `sharings`: the total for each way that a CRT of this shape can share its heads.
    """

    parts: dict[str, int]
    untied: int
    sharings: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        lines = [f"{name:<28}{count:>14,}" for name, count in self.parts.items()]
        lines.append(f"{'total':<28}{self.total:>14,}")
        if self.untied != self.total:
            lines.append(f"{'each use with its own':<28}{self.untied:>14,}")
        lines += [f"{f'heads {name}':<28}{count:>14,}" for name, count in self.sharings.items()]
        return "\n".join(lines)


def parameter_report(model: nn.Module | ModelConfig) -> ParameterReport:
    """What the parameters of a model are, or those of a configuration without building it.

    Raises InputError for a plain function, which has none.
    """
    config = model if isinstance(model, ModelConfig) else getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        parts = parameters_by_part(config)
        sharings = {
            name: sum(parameters_by_part(config.replace(head_sharing=name)).values())
            for name in ("separate", "shared_aux", "tied")
        }
        return ParameterReport(parts, sum(parts.values()), sharings)
    if not isinstance(model, nn.Module):
        raise InputError("a plain function has no parameters to count; give a module")
    seen: set[int] = set()
    parts, untied = {}, 0
    for name, module in _parts_of(model):
        own = {id(p): p.numel() for p in module.parameters()}
        untied += sum(own.values())
        parts[name] = sum(count for key, count in own.items() if key not in seen)
        seen |= own.keys()
    rest = sum(p.numel() for p in model.parameters(recurse=False) if id(p) not in seen)
    if rest:
        parts["of its own"] = rest
    return ParameterReport(parts, untied + rest, {})


def _parts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children; a wrapper with one large child and a head shows that child's children instead."""
    parts = []
    for name, child in model.named_children():
        inner = list(child.named_children())
        if len(inner) > 1 and not any(child.parameters(recurse=False)):
            parts += [(f"{name}.{own}", module) for own, module in inner]
        else:
            parts.append((name, child))
    return parts


@dataclass(frozen=True)
class EntropyReport:
    """Nats a word on text of `grammar`, which no causal model can score below its entropy.

    `own`: what the grammar itself gives this text, its floor; `rate`: the entropy rate, the floor
    of all texts. `above` and `error`, by exit: the mean difference from `own` over sentences,
    nats a word, and its standard error.
    """

    words: int
    rate: float
    own: float
    above: dict[int, float]
    error: dict[int, float]

    @property
    def leaks(self) -> bool:
        """Whether an exit is below the floor by `PROOF` standard errors: proof of a leak."""
        return any(self.above[loop] < -PROOF * self.error[loop] for loop in self.above)

    def __str__(self) -> str:
        lines = [
            f"entropy rate {self.rate:.4f} nats a word; these {self.words:,} words {self.own:.4f}",
            f"{'exit':>4}{'nats a word':>13}{'above the floor':>17}{'standard error':>16}",
        ]
        for loop, above in self.above.items():
            lines.append(
                f"{loop:>4}{self.own + above:>13.4f}{above:>+17.4f}{self.error[loop]:>16.4f}"
            )
        verdict = "below the entropy: it sees what it predicts" if self.leaks else "no proof"
        return "\n".join([*lines, f"verdict: {verdict}"])


def entropy_floor(
    model: nn.Module, data: TokenizedCorpus, split: str = "test", *, seq_len: int = 64
) -> EntropyReport:
    """Hold a model's score on `grammar` against what the grammar itself gives the same sentences.

    Sentences are independent, so the sum of a model's losses over one is at least, in the mean,
    that of the grammar; the difference by sentence is free of the text's luck. Raises InputError
    for another corpus, and for a tokenizer that does not keep every byte of the text.
    """
    if data.corpus.name != "grammar":
        raise InputError(f"only the entropy of grammar is known, not that of {data.corpus.name}")
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
    own = float(floor.sum() / words.sum())
    return EntropyReport(int(words.sum()), grammar.entropy_rate(), own, above, error)
