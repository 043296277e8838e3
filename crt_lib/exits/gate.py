"""A small trained exit gate: per exit one linear map, from the state to how far that exit still is.

It is asked without a vocabulary head: d multiply-adds a token. Fitted by ridge regression of
sqrt(KL(full depth || exit)) on the normalised state, in closed form; the model stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.exits.policy import divergence, full_pass
from crt_lib.exits.scoring import load_arrays, save_arrays, windows_of
from crt_lib.files import check_sum
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT

GATE_FILE = "gate.safetensors"  # beside the checkpoint it was fitted to


@dataclass(frozen=True)
class Gate:
    """`weights`: exit loop -> (d + 1,), the last of them the bias."""

    weights: Mapping[int, Tensor]

    def distance(self, loop: int, z: Tensor) -> Tensor:
        """The expected sqrt(KL), at least 0, of states z (..., d) after exit `loop`: (...)."""
        weight = self.weights[loop].to(z := at_least_float32(z))
        # the norm's own scale makes the products: two operations less
        return (torch.layer_norm(z, z.shape[-1:], weight[:-1]).sum(-1) + weight[-1]).clamp(min=0)

    def save(self, path: str | Path, checkpoint: str) -> None:
        """Write it atomically; `checkpoint` is the digest of the file that it belongs to."""
        arrays = {str(loop): weight.cpu().numpy() for loop, weight in self.weights.items()}
        Path(path).with_name(f"{Path(path).name}.sha256").unlink(missing_ok=True)
        save_arrays(path, "gate", arrays, {"checkpoint": checkpoint})

    @classmethod
    def load(cls, path: str | Path, checkpoint: str) -> "Gate | None":
        """The gate in `path`; None if there is none or it belongs to another checkpoint.

        Raises InputError for a file that is not a gate.
        """
        if not Path(path).is_file():
            return None
        check_sum(Path(path))
        arrays, about = load_arrays(path, "gate")
        if about["checkpoint"] != checkpoint:
            return None
        return cls({int(loop): torch.from_numpy(weight) for loop, weight in arrays.items()})


@torch.inference_mode()
def fit_gate(
    model: CRT, ids: np.ndarray, eot_id: int, *, seq_len: int, ridge: float = 10.0
) -> Gate:
    """The gate of each exit before the last, from honest windows of `ids`; no target is used."""
    d, device = model.config.d_model, model.loop_encoding.device
    penalty = ridge * torch.eye(d + 1, device=device, dtype=torch.float64)
    penalty[-1, -1] = 0.0
    squares = {loop: penalty.clone() for loop in model.config.exit_loops}
    moments = {loop: penalty.new_zeros(d + 1) for loop in squares}
    for inputs, _ in windows_of(model, ids, eot_id, seq_len):
        loops = {loop.number: loop for loop in full_pass(model, inputs)}
        log_p = loops[model.config.n_loops].log_probabilities
        for number in squares:
            loop = loops.pop(number)
            kl = divergence(log_p, loop.log_probabilities).flatten()
            z = at_least_float32(loop.z.flatten(0, 1))
            x = F.pad(F.layer_norm(z, (d,)).double(), (0, 1), value=1.0)
            squares[number] += x.T @ x
            moments[number] += x.T @ kl.double().sqrt()
    fitted = {loop: torch.linalg.solve(squares[loop], moments[loop]) for loop in squares}
    return Gate({loop: weight.float() for loop, weight in fitted.items()})
