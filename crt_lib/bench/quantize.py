"""`crt bench quantize`: what 8-bit weights lose, by exit, and the memory they take."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from crt_lib.audit.compare import by_document, document_of_tokens
from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.model import CRT
from crt_lib.runs.machine import measured_on
from crt_lib.text.tokenizer import TokenizedCorpus


@torch.inference_mode()
def bench_quantize(
    model: CRT, data: TokenizedCorpus, seq_len: int, *, rows: int, max_tokens: int
) -> list[dict[str, Any]]:
    """A row an exit: loss of the first `max_tokens` of test in float32 and in 8 bits, honestly.

    Each token is scored as decoding computes it, one position at a time, `rows` windows beside each
    other. `word_ppl_ratio` is exp(what is lost a word); `low` and `high` its 95 % interval over
    documents. `weight_mb`: of the weights as they lie. Raises InputError as `Layout`.
    """
    ids, eot_id = data.test.ids[:max_tokens], data.tokenizer.eot_id
    a_word = len(data.test.ids) / data.test.n_words  # tokens
    document = document_of_tokens(data, "test", seq_len)[0][: len(ids)]
    plain, size = _losses(model, ids, eot_id, seq_len, rows, None)
    rounded, rounded_size = _losses(model, ids, eot_id, seq_len, rows, "int8")
    made = []
    for loop, before, after in zip(model.config.head_loops, plain, rounded, strict=True):
        (more,) = by_document(document, (after - before)[:, None])
        ratio, low, high = np.exp(a_word * np.array([more.mean, more.low, more.high])).tolist()
        row: dict[str, Any] = {"quantize": "int8", "exit": loop, "rows": rows, "tokens": len(ids)}
        row |= {"loss": float(before.mean()), "quantized_loss": float(after.mean())}
        row |= {"word_ppl_ratio": ratio, "low": low, "high": high}
        row |= {"weight_mb": size / 1e6, "quantized_weight_mb": rounded_size / 1e6}
        made.append(row | measured_on())
    return made


def _losses(
    model: CRT, ids: np.ndarray, eot_id: int, seq_len: int, rows: int, quantize: str | None
) -> tuple[np.ndarray, int]:
    """Nats of each token at each exit (exits, tokens), and the bytes of the weights."""
    found, exits = [], model.config.head_loops
    for batch in evaluation_windows(ids, seq_len, rows, eot_id):
        count, length = batch.inputs.shape
        step = Step(model, Memory(model.config, count, length, model.loop_encoding), quantize)
        losses = []  # (B,) of each position and exit
        for inputs, targets in zip(batch.inputs.T, batch.targets.T, strict=True):
            z = step.begin(inputs)
            for loop in range(1, model.config.n_loops + 1):
                z = step.loop(loop, z)
                if loop in exits:
                    features, vocabulary = step.readout(loop, z)
                    logits = vocabulary(features)
                    losses.append(F.cross_entropy(logits, targets, reduction="none"))
            step.end(loop)
        by_exit = torch.stack(losses).view(length, len(exits), count).permute(1, 2, 0)
        found.append(by_exit[:, batch.targets != NOT_SCORED].double().numpy())
    return np.concatenate(found, 1), sum(step.layout.sizes)
