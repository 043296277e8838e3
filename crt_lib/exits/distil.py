"""Distilled exits: a trained model learns on, each exit from the text and from what teachers say.

An early exit has less depth than the last. Of a text it sees one token a position; a teacher's
distribution says how likely all the others were (Hinton et al. 2015, arXiv:1503.02531), and where
the teacher is the model's own last exit, what the exit is there to foretell.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from crt_lib.cached.step import evaluating
from crt_lib.data import NOT_SCORED
from crt_lib.exits.decode import Sampling, generate
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT

PROMPT = 8  # tokens of a row that a teacher continues


class DistilledLosses:
    """What a training calls instead of `model`: its exits' losses, in part towards `teachers`.

    Of an exit p and the teachers' mean q: (1 - share) * -log p(target) + share * -sum(q log p), in
    nats, the mean over the scored positions. A teacher speaks by its last exit, without dropout.

    `written`: of each row only the first PROMPT tokens are the text's, and a teacher, drawn by
    chance, writes the others. What teachers know of the training text by heart stays with them.
    """

    def __init__(
        self, model: CRT, teachers: Sequence[CRT], share: float, written: bool = False
    ) -> None:
        self.model, self.teachers, self.share, self.written = model, teachers, share, written

    def __call__(self, ids: Tensor, exits: Sequence[int], targets: Tensor) -> dict[int, Tensor]:
        """{loop: loss}; ids and targets (B, T)."""
        if self.written:
            ids, targets = self._written(ids)
        scored = targets != NOT_SCORED
        q = self._said(ids)[scored]
        mixed = (self.share * q).scatter_add_(
            -1, targets[scored][:, None], torch.full_like(q[:, :1], 1 - self.share)
        )
        return {
            loop: -(mixed * at_least_float32(logits[scored]).log_softmax(-1)).sum(-1).mean()
            for loop, logits in self.model(ids, exits).items()
        }

    def _written(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T - 1) that begin as `ids` and are a teacher's own text."""
        seed, which = torch.randint(2**31, (2,)).tolist()
        teacher, begun = self.teachers[which % len(self.teachers)], ids[:, :PROMPT].tolist()
        drawn = Sampling(temperature=1.0)
        with torch.autocast(ids.device.type, enabled=False):
            made = generate(teacher, begun, ids.shape[1] - PROMPT, sampling=drawn, seed=seed)
        rows = [start + new.tokens for start, new in zip(begun, made, strict=True)]
        text = torch.tensor(rows, device=ids.device)
        return text[:, :-1], text[:, 1:]

    @torch.no_grad()
    def _said(self, ids: Tensor) -> Tensor:
        """The teachers' mean probabilities (B, T, V)."""
        said = []
        for teacher in self.teachers:
            last = teacher.config.n_loops
            with evaluating(teacher):
                said.append(at_least_float32(teacher(ids, (last,))[last]).softmax(-1))
        return torch.stack(said).mean(0)
