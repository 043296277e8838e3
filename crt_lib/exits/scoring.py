"""Numbers of every token of a text, honestly: by windows, each token scored once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from crt_lib.data import evaluation_windows
from crt_lib.model import CRT


@contextmanager
def evaluating(model: CRT) -> Iterator[None]:
    """A context in which `model` is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def windows_of(
    model: CRT, ids: np.ndarray, eot_id: int, seq_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T), all scored, on the device of the model, which evaluates."""
    device = model.loop_encoding.device
    with evaluating(model):
        for batch in evaluation_windows(ids, seq_len, 8, eot_id):
            yield batch.inputs.to(device), batch.targets.to(device)


@torch.inference_mode()
def by_token(
    model: CRT,
    ids: np.ndarray,
    eot_id: int,
    seq_len: int,
    measure: Callable[[Tensor, Tensor], dict[str, Tensor]],
) -> dict[str, np.ndarray]:
    """What `measure` finds for each token: (B, T, ...) of inputs and targets (B, T); (N, ...)."""
    found: dict[str, np.ndarray] = {}
    begin = 0
    for inputs, targets in windows_of(model, ids, eot_id, seq_len):
        here = slice(begin, begin := begin + targets.numel())
        for name, values in measure(inputs, targets).items():
            own = values.flatten(0, 1).cpu().numpy()
            # in one piece from the start: small ones would lie between the logits on the heap
            found.setdefault(name, np.empty((len(ids), *own.shape[1:]), own.dtype))[here] = own
    return found
