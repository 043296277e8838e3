"""Numbers of every token of a text, each token scored once, and the files they are kept in."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from crt_lib.cached.step import evaluating
from crt_lib.data import evaluation_windows
from crt_lib.exits.policy import Loop, Policy, full_pass, nats_of, run_with_exits
from crt_lib.files import InputError, atomic_path
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT

DELAY = 5  # seconds after which a terminal sees how far it is
Measure = Callable[[Loop, Tensor], dict[str, Tensor]]  # of targets (B, T): values (B, T) by name


def windows_of(
    model: CRT, ids: np.ndarray, eot_id: int, seq_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T), all scored, on the device of the model, which evaluates."""
    device, rows = model.loop_encoding.device, 8
    windows = evaluation_windows(ids, seq_len, rows, eot_id)
    batches = math.ceil(len(ids) / seq_len / rows)
    with evaluating(model):
        for batch in tqdm(windows, total=batches, leave=False, delay=DELAY, disable=None):
            yield batch.inputs.to(device), batch.targets.to(device)


@torch.inference_mode()
def by_token(
    model: CRT,
    ids: np.ndarray,
    eot_id: int,
    seq_len: int,
    measure: Measure,
    n_loops: int | None = None,
) -> dict[str, np.ndarray]:
    """What `measure` finds after each loop of each token, of those loops that it finds it after."""
    found: dict[str, np.ndarray] = {}
    begin = 0
    for inputs, targets in windows_of(model, ids, eot_id, seq_len):
        here = slice(begin, begin := begin + targets.numel())
        for name, own in by_loop(full_pass(model, inputs, n_loops), targets, measure).items():
            # in one piece from the start: small ones would lie between the logits on the heap
            found.setdefault(name, np.empty((len(ids), own.shape[1]), own.dtype))[here] = own
    return found


def by_loop(loops: Iterable[Loop], targets: Tensor, measure: Measure) -> dict[str, np.ndarray]:
    """What `measure` finds after each of `loops`, by name (B * T, loops that have it)."""
    found: dict[str, list[Tensor]] = {}
    for loop in loops:
        for name, values in measure(loop, targets).items():
            found.setdefault(name, []).append(values.flatten())
    return {name: torch.stack(values, -1).cpu().numpy() for name, values in found.items()}


def guesses(loop: Loop, targets: Tensor) -> dict[str, Tensor]:
    """Nats of the targets, the best token and its probability, each (B, T)."""
    sure, guess = (pair[..., 0] for pair in loop.top)
    return {"loss": loop.losses(targets).float(), "guess": guess, "sure": sure}


@torch.inference_mode()
def evaluate_with_exits(
    model: CRT, ids: np.ndarray, eot_id: int, policy: Policy, *, seq_len: int
) -> np.ndarray:
    """Each token's nats (N,), honest protocol, with exits taken as in decoding.

    Unlike a trace's, the context of a token has left too where the policy let it.
    """
    nats = []
    for inputs, targets in windows_of(model, ids, eot_id, seq_len):
        log_p = at_least_float32(run_with_exits(model, inputs, policy).logits).log_softmax(-1)
        nats.append(nats_of(log_p, targets).double().flatten().cpu().numpy())
    return np.concatenate(nats)


def save_arrays(path: str | Path, what: str, arrays: dict[str, np.ndarray], about: Any) -> None:
    """Write arrays, and what is JSON `about` them, to one safetensors file, atomically."""
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(arrays, temporary, {what: json.dumps(about)})
        except SafetensorError as error:  # a full disk, for instance
            raise OSError(str(error)) from error


def load_arrays(path: str | Path, what: str) -> tuple[dict[str, Any], Any]:
    """What `save_arrays` wrote as a `what`; raises InputError for a file that is not one."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})[what])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a {what} that can be read: {error!r}") from error
