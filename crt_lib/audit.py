"""Does a language model see the tokens it is asked to predict?"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CausalityReport:
    """Which logits moved when one later token was changed.

    `changes` maps each exit (0 for a model without exits) to a (length, length) matrix: entry
    (t, j) is the largest change of the logits at position t when token j is replaced by others.
    Causal means exactly zero wherever t < j.
    """

    changes: dict[int, Tensor]

    @property
    def leaks(self) -> bool:
        """Whether any logit before the changed token moved, at any exit."""
        return any(bool(matrix.triu(1).any()) for matrix in self.changes.values())

    @property
    def first_leaking_offset(self) -> int | None:
        """The smallest j - t > 0 at which token j moves the logits at t; None when causal."""
        offsets = [
            int((pairs[:, 1] - pairs[:, 0]).min())
            for matrix in self.changes.values()
            if len(pairs := matrix.triu(1).nonzero())
        ]
        return min(offsets, default=None)

    @property
    def furthest_leaking_offset(self) -> int | None:
        """The largest j - t > 0 at which token j moves the logits at t; None when causal."""
        offsets = [
            int((pairs[:, 1] - pairs[:, 0]).max())
            for matrix in self.changes.values()
            if len(pairs := matrix.triu(1).nonzero())
        ]
        return max(offsets, default=None)

    def __str__(self) -> str:
        lines = ["exit  leaking pairs (t < j)  nearest j - t  largest change of a logit"]
        for loop, matrix in self.changes.items():
            pairs = matrix.triu(1).nonzero()
            offset = str(int((pairs[:, 1] - pairs[:, 0]).min())) if len(pairs) else "-"
            worst = matrix.triu(1).max().item()
            lines.append(f"{loop:>4}  {len(pairs):>21}  {offset:>13}  {worst:.2e}")
        lines.append("verdict: " + ("sees the future" if self.leaks else "causal"))
        return "\n".join(lines)


@torch.no_grad()
def causality_report(
    model: nn.Module, vocab_size: int, *, length: int = 24, seed: int = 0
) -> CausalityReport:
    """Replace each token of a random row in turn and see which logits before it move.

    `model`: a CRT, or any module from ids (B, T) to logits (B, T, V), to `{exit: logits}` or to an
    object with `.logits`; it is put into evaluation mode meanwhile. Changes nothing that is not a
    function of the input: two equal rows must give bit-identical logits, or ValueError is raised.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    row = torch.randint(vocab_size, (length,), generator=generator)
    shift = torch.randint(1, vocab_size, (length,), generator=generator)
    rows = row.repeat(length + 1, 1)  # row j has token j replaced, the last one none
    rows[:length].diagonal().copy_((row + shift) % vocab_size)

    was_training = model.training
    model.eval()
    try:
        baseline, again = (_logits(model, rows[-1:].to(device)) for _ in range(2))
        changes = {loop: torch.zeros(length, length) for loop in baseline}
        for loop in baseline:
            if not torch.equal(baseline[loop], again[loop]):
                raise ValueError("the model gives other logits for the same ids: it is random")
        for j in range(length):
            for loop, logits in _logits(model, rows[j : j + 1].to(device)).items():
                difference = (logits - baseline[loop]).abs().amax(-1)[0]
                changes[loop][:, j] = difference.float().cpu()
    finally:
        model.train(was_training)
    return CausalityReport(changes)


def _logits(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    output = model(ids)
    if isinstance(output, dict) and all(isinstance(key, int) for key in output):
        return output
    return {0: getattr(output, "logits", output)}
