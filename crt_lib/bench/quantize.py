"""`crt bench quantize`: what 8-bit weights lose, by exit, and the memory they take."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.compare import by_document
from crt_lib.cached.memory import Memory
from crt_lib.cached.products import QUANTIZE
from crt_lib.cached.step import Step
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.exits.trace import document_or_window
from crt_lib.model import CRT
from crt_lib.runs.machine import measured_on
from crt_lib.text.tokenizer import TokenizedCorpus


@torch.inference_mode()
def bench_quantize(
    model: CRT, data: TokenizedCorpus, seq_len: int, *, rows: int = 8, max_tokens: int = 16_384
) -> list[dict[str, Any]]:
    """A row an exit: loss of the first `max_tokens` of test in float32 and in 8 bits, honestly.

    Each token is scored as decoding computes it, one position at a time, `rows` windows beside each
    other. `word_ppl_ratio` is exp(what is lost a word); `low` and `high` its 95 % interval over
    documents. `weight_mb`: of the weights as they lie. Raises InputError as `Layout`.
    """
    ids, was_training = data.test.ids[:max_tokens], model.training
    model.eval()
    try:
        ways = {
            way: _losses(model, ids, data.tokenizer.eot_id, seq_len, rows, way)
            for way in (None, *QUANTIZE)
        }
    finally:
        model.train(was_training)
    a_word = len(data.test.ids) / data.test.n_words  # tokens
    document = document_or_window(data, "test", seq_len)[0][: len(ids)]
    plain, held = ways[None]
    made = []
    for way in QUANTIZE:
        found, held_in_way = ways[way]
        for loop in model.config.head_loops:
            (more,) = by_document(document, (found[loop] - plain[loop])[:, None])
            row: dict[str, Any] = {"quantize": way, "exit": loop, "rows": rows, "tokens": len(ids)}
            row |= {"loss": float(plain[loop].mean()), "quantized_loss": float(found[loop].mean())}
            ends = {"word_ppl_ratio": more.mean, "low": more.low, "high": more.high}
            row |= {name: math.exp(a_word * nats) for name, nats in ends.items()}
            row |= {"weight_mb": held / 1e6, "quantized_weight_mb": held_in_way / 1e6}
            made.append(row | measured_on())
    return made


def _losses(
    model: CRT, ids: np.ndarray, eot_id: int, seq_len: int, rows: int, quantize: str | None
) -> tuple[dict[int, np.ndarray], int]:
    """Nats of each token by exit, and the bytes of the weights."""
    found: dict[int, list[np.ndarray]] = {loop: [] for loop in model.config.head_loops}
    held = 0
    for batch in evaluation_windows(ids, seq_len, rows, eot_id):
        count, length = batch.inputs.shape
        memory = Memory(model.config, count, length, model.loop_encoding)
        step = Step(model, memory, quantize)
        held = sum(step.layout.sizes)
        scored = (batch.targets != NOT_SCORED).numpy()
        losses = torch.empty(len(found), *batch.targets.shape)
        for at in range(length):
            for index, logits in enumerate(_every_exit(step, batch.inputs[:, at])):
                losses[index, :, at] = F.cross_entropy(
                    logits, batch.targets[:, at], reduction="none", ignore_index=NOT_SCORED
                )
        for loop, own in zip(found, losses.double().numpy(), strict=True):
            found[loop].append(own[scored])
    return {loop: np.concatenate(parts) for loop, parts in found.items()}, held


def _every_exit(step: Step, ids: Tensor) -> Iterator[Tensor]:
    """Logits (B, V) of each exit for one token a row."""
    last = step.config.n_loops
    z = step.begin(ids)
    for loop in range(1, last + 1):
        z = step.loop(loop, z)
        if loop in step.config.head_loops:
            features, vocabulary = step.readout(loop, z)
            yield vocabulary(features)
    step.end(last)
