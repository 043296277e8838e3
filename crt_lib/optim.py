"""The optimizers: AdamW, and Muon with a Newton-Schulz iteration in the precision at hand."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crt_lib.config import TrainConfig
from crt_lib.device import bf16_is_fast

if TYPE_CHECKING:
    from crt_lib.config import LanguageModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic of Jordan et al. 2024
ITERATIONS = 5
EPS = 1e-7
STACKED = 1 << 21  # numbers of equally shaped matrices that are turned at once: 8 MiB in float32


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices: momentum whose singular values are brought near 1.

    The steps of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025,
    arXiv:2502.16982) and its defaults. That one computes in bfloat16 whatever the device; this one
    in `dtype`, by default bfloat16 where it is fast and float32 elsewhere, and matrices of
    equal shape together. Parameters are (m, n); their state is `momentum_buffer`, as torch's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon is for matrices; leave other parameters to AdamW")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            same: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same.setdefault((p.shape, p.device), []).append(p)
            for (shape, _), parameters in same.items():
                most = max(1, STACKED // shape.numel())
                for start in range(0, len(parameters), most):
                    self._turn(parameters[start : start + most], group)
        return loss

    def _turn(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        (m, n), device = parameters[0].shape, parameters[0].device
        dtype = self.dtype or (torch.bfloat16 if bf16_is_fast(device) else torch.float32)
        steps = torch.empty(len(parameters), m, n, dtype=dtype, device=device)
        for p, step in zip(parameters, steps, strict=True):
            state, gradient = self.state[p], p.grad
            assert gradient is not None  # `step` leaves out those without
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            step.copy_(gradient.lerp(buffer, momentum))  # Nesterov
        for p, step in zip(parameters, orthogonalise(steps), strict=True):
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(step, alpha=-lr * 0.2 * math.sqrt(max(m, n)))


def orthogonalise(x: Tensor) -> Tensor:
    """Each matrix of x (B, m, n) with its singular values brought to about 1.

    Five times X <- a X + b A X + c A^2 X with A = X X^T, after a division by the Frobenius norm;
    for m > n the same from the right. In float32 a long matrix (one side twice the other) is only
    multiplied at the ends: A and the product of all a + b A + c A^2 are as small as its short side,
    and A follows from them. In bfloat16 that would lose too much.
    """
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    _, m, n = x.shape
    if max(m, n) < 2 * min(m, n) or x.dtype == torch.bfloat16:
        for _ in range(ITERATIONS):
            gram = _gram(x)
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, *((factor, x) if m <= n else (x, factor)), beta=a)
        return x
    gram = _gram(x)
    product = factor = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ x if m <= n else x @ product


def _factor(gram: Tensor) -> Tensor:
    """a + b A + c A^2."""
    a, b, c = COEFFICIENTS
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def _gram(x: Tensor) -> Tensor:
    """The smaller of X X^T and X^T X."""
    return x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x


def make_optimizers(model: "LanguageModel", config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the model and AdamW for the rest.

    Muon makes a matrix's update orthogonal; embeddings, vocabulary heads, gains, biases and
    convolution kernels are not such matrices.
    """
    inner: list[torch.nn.Parameter] = []
    if config.optimizer == "muon":
        embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        vocabulary = model.config.vocab_size
        inner = [
            p
            for name, p in model.named_parameters()
            if p.ndim == 2 and name.endswith("weight")
            if p not in embeddings and p.shape[0] != vocabulary
        ]
    rest = [p for p in model.parameters() if p not in set(inner)]
    rate, decay = config.max_lr, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=config.betas, weight_decay=decay, fused=True)
    ]
    if inner:
        optimizers.append(Muon(inner, lr=rate, weight_decay=decay))
    return optimizers


def learning_rate(update: int, updates: int, config: TrainConfig) -> float:
    """OneCycle with cosine annealing at `update` in 0..updates-1, as torch's OneCycleLR has it.

    From max_lr / 25 up to max_lr over the warm-up, then down to max_lr / 250,000. A function, since
    torch's scheduler divides by zero when the warm-up ends on update 0.
    """
    peak = max(config.warmup * updates - 1, 0.0)
    low, high, end = config.max_lr / 25, config.max_lr, config.max_lr / 250_000
    if update < peak:
        start, stop, share = low, high, update / peak
    else:
        start, stop, share = high, end, (update - peak) / (updates - 1 - peak or 1.0)
    return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2


def exits_of_update(
    head_loops: tuple[int, ...], update: int, config: TrainConfig, progress: float = 1.0
) -> tuple[int, ...]:
    """The loops whose heads `update` trains, the deepest being the loops it runs.

    All of `head_loops`, unless after this `progress`, a share of the updates, some loops have not
    begun (`loop_starts`), or `loop_sampling` draws how deep the update goes (then up to the next
    loop with a head), or `exits_trained` draws one exit from those before the deepest.
    """
    rng = np.random.default_rng([config.seed, update, 1])
    begun = 1 + sum(progress >= share for share in config.loop_starts)
    if begun <= len(config.loop_starts):
        head_loops = head_loops[: 1 + sum(loop < begun for loop in head_loops)]
    exits = head_loops
    if config.loop_sampling != "none":
        deepest = head_loops[-1]
        if config.loop_sampling == "uniform":
            loops = int(rng.integers(1, deepest + 1))
        else:
            sigma = 0.5  # Huginn's: 1 + Poisson(e^tau), tau normal, with the mean `deepest`
            tau = rng.normal(math.log(max(deepest - 1, 1e-9)) - sigma**2 / 2, sigma)
            loops = min(1 + int(rng.poisson(math.exp(tau))), deepest)
        exits = tuple(k for k in head_loops if k < loops)
        exits = (*exits, head_loops[len(exits)])
    if config.exits_trained == "one" and len(exits) > 2:
        exits = (exits[rng.integers(len(exits) - 1)], exits[-1])
    return exits


def random_seed(seed: int, update: int, micro: int) -> int:
    """A seed below 2**63 for each (seed, update, micro-batch)."""
    return int(np.random.SeedSequence([seed, update, micro]).generate_state(1, np.uint64)[0] >> 1)
