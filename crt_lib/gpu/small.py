"""`crt gpu`: the small models that its checks compare."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED
from crt_lib.device import Precision
from crt_lib.loss import total_loss
from crt_lib.model import CRT
from crt_lib.runs.graphs import GraphedLosses
from crt_lib.runs.profiles import load_profile

Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Bench:
    """Where and at which size the checks run: small models without dropout, random tokens."""

    device: torch.device
    toy: bool

    def model(self, recipe: str, dtype: torch.dtype = torch.float64) -> CRT:
        """In evaluation mode, no weight at the value that it begins with."""
        d, heads, vocabulary = (32, 2, 100) if self.toy else (128, 4, 1000)
        config = load_profile("smoke", recipe).model
        assert isinstance(config, ModelConfig)  # no check is of a baseline
        width = {"embed_dim": d} if recipe == "crt2" else {}
        sizes = {"d_model": d, "n_heads": heads, "vocab_size": vocabulary, "dropout": 0.0}
        torch.manual_seed(0)
        model = CRT(config.replace(**sizes, **width))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.to(self.device, dtype).eval()

    def ids(self) -> Tensor:
        """Tokens (3, length) for the models."""
        generator, length = torch.Generator().manual_seed(2), 24 if self.toy else 96
        return torch.randint(100, (3, length), generator=generator).to(self.device)

    def targets(self) -> Tensor:
        """What follows the tokens, the last not scored."""
        targets = self.ids().roll(-1, 1)
        targets[:, -1] = NOT_SCORED
        return targets

    def loss(self, model: CRT) -> Tensor:
        """Eq. 5 on the tokens."""
        return total_loss(model(self.ids(), targets=self.targets()), 0.3)

    def graphed(self, model: CRT) -> Callable[[], Tensor]:
        """What gives the same loss from CUDA graphs, on a CPU from the passes that they are of."""
        losses = GraphedLosses(model, Precision("fp32", "as the check asks"))
        exits, ids, targets = model.config.head_loops, self.ids(), self.targets()
        if self.toy:
            plain = losses.plain(exits)
            return lambda: total_loss(dict(zip(exits, plain(ids, targets), strict=True)), 0.3)
        return lambda: total_loss(losses(ids, exits, targets), 0.3)
