"""A small trained exit gate: per exit one linear map, from the state to how far that exit still is.

It is asked without a vocabulary head: d multiply-adds a token. Fitted by ridge regression of
sqrt(KL(full depth || exit)) on the normalised state, in closed form; the model stays as it is.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crt_lib.cached.products import wide_on_cpu
from crt_lib.data import NOT_SCORED, evaluation_windows
from crt_lib.files import InputError, atomic_path, check_sum
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT

GATE_FILE = "gate.safetensors"  # beside the checkpoint it was fitted to


@dataclass(frozen=True)
class Gate:
    """`weights`: exit loop -> (d + 1,), the last of them the bias."""

    weights: Mapping[int, Tensor]

    def distance(self, loop: int, z: Tensor) -> Tensor:
        """The expected sqrt(KL), at least 0, of states z (..., d) after exit `loop`: (...)."""
        z = _normalised(z)
        weight = self.weights[loop].to(z)
        return (z @ weight[:-1] + weight[-1]).clamp(min=0)

    def asker(self) -> Callable[[int, Tensor], list[float]]:
        """A function of an exit loop and states (B, d) to their distances, of few operations."""
        held = {loop: (weight[:-1], weight[-1:]) for loop, weight in self.weights.items()}
        plain = {loop: (w.cpu().numpy(), float(w.sum()), float(b)) for loop, (w, b) in held.items()}
        ones = np.ones(len(next(iter(held.values()))[0]), np.float32)

        def distances(loop: int, z: Tensor) -> list[float]:
            if len(z) == 1 and wide_on_cpu(z):
                (w, total, b), x = plain[loop], z.numpy()[0]  # half the time of torch's calls
                mean = float(x @ ones) / len(x)
                deviation = math.sqrt(float(x @ x) / len(x) - mean**2 + 1e-5)
                return [max((float(x @ w) - mean * total) / deviation + b, 0.0)]
            weight, bias = held[loop]
            z = torch.layer_norm(at_least_float32(z), weight.shape, None, None, 1e-5, False)
            return [max(d, 0.0) for d in torch.addmv(bias.to(z), z, weight.to(z)).tolist()]

        return distances

    def save(self, path: str | Path, checkpoint: str) -> None:
        """Write it atomically; `checkpoint` is the digest of the file that it belongs to."""
        arrays = {str(loop): weight.cpu() for loop, weight in self.weights.items()}
        Path(path).with_name(f"{Path(path).name}.sha256").unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, {"gate": json.dumps({"checkpoint": checkpoint})})

    @classmethod
    def load(cls, path: str | Path, checkpoint: str) -> "Gate | None":
        """The gate in `path`; None if there is none or it belongs to another checkpoint.

        Raises InputError for a file that is not a gate.
        """
        if not Path(path).is_file():
            return None
        check_sum(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["gate"])
                names = file.keys()
                weights = {int(name): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a gate that can be read: {error!r}") from error
        return cls(weights) if about["checkpoint"] == checkpoint else None


@torch.inference_mode()
def fit_gate(
    model: CRT, ids: np.ndarray, eot_id: int, *, seq_len: int, ridge: float = 10.0
) -> Gate:
    """The gate of each exit before the last, from honest windows of `ids`, as of the training text.

    The text is read by the full model, which is the teacher: nothing of the right answers is used.
    """
    exits, d = model.config.exit_loops, model.config.d_model
    device = model.loop_encoding.device
    double = functools.partial(torch.zeros, device=device, dtype=torch.float64)
    squares = {loop: double(d + 1, d + 1) for loop in exits}
    moments = {loop: double(d + 1) for loop in exits}
    was_training = model.training
    model.eval()
    try:
        for batch in evaluation_windows(ids, seq_len, 8, eot_id):
            scored = (batch.targets != NOT_SCORED).to(device)
            loops = model.hidden_states(batch.inputs.to(device), model.config.n_loops)
            states = {loop: z[scored] for loop, z in loops}
            log_p = _log_probabilities(model, model.config.n_loops, states)
            for loop in exits:
                log_q = _log_probabilities(model, loop, states)
                kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
                x = F.pad(_normalised(states[loop]).double(), (0, 1), value=1.0)
                squares[loop] += x.T @ x
                moments[loop] += x.T @ kl.double().sqrt()
    finally:
        model.train(was_training)
    penalty = ridge * torch.eye(d + 1, device=device, dtype=torch.float64)
    penalty[-1, -1] = 0.0
    fitted = {loop: torch.linalg.solve(squares[loop] + penalty, moments[loop]) for loop in exits}
    return Gate({loop: weight.float() for loop, weight in fitted.items()})


def _normalised(z: Tensor) -> Tensor:
    return F.layer_norm(at_least_float32(z), z.shape[-1:])


def _log_probabilities(model: CRT, loop: int, states: dict[int, Tensor]) -> Tensor:
    return at_least_float32(F.linear(*model.readout(loop, states[loop]))).log_softmax(-1)
