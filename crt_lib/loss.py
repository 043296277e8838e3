"""The loss: cross-entropy of a vocabulary projection without the full logits, and eq. 5."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crt_lib.data import NOT_SCORED

WHOLE_ELEMENTS = 1 << 24  # logits that are computed at once: 64 MiB in float32
CHUNK_ELEMENTS = 1 << 22  # logits a chunk where there are more
GPU_CHUNK_ELEMENTS = 1 << 25  # on a GPU, which a small chunk would leave waiting for the next
FUSED = True  # whether training on a CPU computes a loss and its gradients in one pass
FUSED_ROWS = 256  # positions a chunk in training on a CPU: 8 MiB of logits for 8,192 words
_TORCH_CHUNKS = hasattr(F, "linear_cross_entropy")
SUMMED_WEIGHTS = 1 << 22  # above this size, exits with one matrix sum their gradients by it


def total_loss(losses: dict[int, Tensor], aux_weight: float) -> Tensor:
    """Eq. 5: (1 - lambda) L_final + lambda mean(L_i), i over the intermediate exits, if any."""
    *intermediate, final = (losses[loop] for loop in sorted(losses))
    if not intermediate:
        return final
    return (1 - aux_weight) * final + aux_weight * torch.stack(intermediate).mean()


def exit_losses(
    exits: Sequence[Tensor], weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> list[Tensor]:
    """-log softmax(features @ weight.T)[target] in nats (eq. 4) of exits that share a matrix.

    features (..., d) of each exit, weight (V, d), targets (...), NOT_SCORED where nothing is
    scored. `reduction`: "mean" over the scored positions, or "none" for the shape of `targets`,
    zero where ignored. Equals cross_entropy(linear(features, weight), targets), of which only a
    chunk of positions is held at a time.
    """
    shape = targets.shape
    targets = targets.reshape(-1)
    exits = [features.reshape(-1, features.shape[-1]) for features in exits]
    device = weight.device.type
    half = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if half else weight.dtype
    learns = torch.is_grad_enabled() and (exits[0].requires_grad or weight.requires_grad)
    fused = FUSED and dtype != torch.float16  # it would underflow there
    if device == "cpu" and learns and reduction == "mean" and fused:
        together = len(exits) if weight.numel() > SUMMED_WEIGHTS else 1
        groups = [exits[i : i + together] for i in range(0, len(exits), together)]
        return [v for group in groups for v in _FusedMean.apply(weight, targets, dtype, *group)]
    losses = [_chunked(features, weight, targets, reduction, dtype) for features in exits]
    return losses if reduction == "mean" else [loss.view(shape) for loss in losses]


def _chunked(
    features: Tensor, weight: Tensor, targets: Tensor, reduction: str, dtype: torch.dtype
) -> Tensor:
    on_cpu = features.device.type == "cpu"
    chunk = max(1, (CHUNK_ELEMENTS if on_cpu else GPU_CHUNK_ELEMENTS) // weight.shape[0])
    if targets.numel() * weight.shape[0] <= WHOLE_ELEMENTS:
        return _whole(features, weight, targets, reduction)
    if not _TORCH_CHUNKS or (on_cpu and dtype != weight.dtype):
        # on a CPU torch's chunks compute half precision as float32: recomputing is faster
        return _checkpointed_chunks(features, weight, targets, reduction, chunk)
    options = torch.nn.LinearCrossEntropyOptions(  # compact: no second (V, d) gradient buffer
        batch_chunk_size=chunk, chunking_method=None, acc_policy="compact", acc_dtype=torch.float32
    )
    how: dict[str, Any] = {"ignore_index": NOT_SCORED, "reduction": reduction, "options": options}
    return F.linear_cross_entropy(features.to(dtype), weight.to(dtype), targets, **how)


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 where they are already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _whole(features: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    logits = at_least_float32(F.linear(features, weight))
    return F.cross_entropy(logits, targets, ignore_index=NOT_SCORED, reduction=reduction)


class _FusedMean(torch.autograd.Function):
    """The mean losses of exits and all gradients in one pass, while a chunk's logits are in cache.

    Of several exits only the sum of their gradients by the matrix is kept. It is what the backward
    pass needs where their losses weigh the same, as in eq. 5; elsewhere it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, targets: Tensor, dtype: torch.dtype, *exits: Tensor
    ) -> tuple[Tensor, ...]:
        matrix, by_weight = weight.to(dtype), torch.zeros_like(weight)
        passes = [_fused_pass(features, matrix, targets, by_weight) for features in exits]
        losses, ctx.by_features = zip(*passes, strict=True)
        ctx.by_weight, ctx.dtype = by_weight, dtype
        ctx.save_for_backward(weight, targets, *(exits if len(exits) > 1 else ()))
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, targets, *exits = ctx.saved_tensors
        if all(gradient == gradients[0] for gradient in gradients[1:]):
            by_weight = ctx.by_weight.mul_(gradients[0])
        else:
            by_weight, matrix = torch.zeros_like(weight), weight.to(ctx.dtype)
            for features, gradient in zip(exits, gradients, strict=True):
                _fused_pass(features, matrix, targets, by_weight, gradient)
        by_features = [v * g for v, g in zip(ctx.by_features, gradients, strict=True)]
        ctx.by_weight = ctx.by_features = None  # scaled in place: there is no second time
        return by_weight, None, None, *by_features


def _fused_pass(
    features: Tensor, matrix: Tensor, targets: Tensor, by_weight: Tensor, scale: Tensor | float = 1
) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient by `features`; that by the matrix, scaled, is added in place.

    With p = softmax(z), the gradient of the mean by the logits z is (p - onehot(target)) / scored.
    """
    dtype = matrix.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scored = targets != NOT_SCORED
    count = scored.sum()
    targets = targets.clamp(min=0)[:, None]
    loss = torch.zeros((), dtype=wide)
    by_features = torch.empty_like(features)
    for start in range(0, len(features), FUSED_ROWS):
        rows = slice(start, start + FUSED_ROWS)
        inputs, target = features[rows].to(dtype), targets[rows]
        share = scored[rows, None].to(wide) / count
        z = (inputs @ matrix.T).to(wide)
        z -= z.amax(-1, keepdim=True)
        chosen = z.gather(1, target)
        z.exp_()
        total = z.sum(-1, keepdim=True)
        loss += ((total.log() - chosen) * share).sum()
        z *= share / total
        z.scatter_add_(1, target, -share)
        z = z.to(dtype)
        by_features[rows] = z @ matrix
        if by_weight.dtype == dtype:
            by_weight.addmm_(z.T, inputs * scale)
        else:
            by_weight += z.T @ (inputs * scale)
    return loss, by_features


def _checkpointed_chunks(
    features: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk: int
) -> Tensor:
    """Chunks whose logits are computed again in the backward pass; any torch has what it needs."""
    losses = [
        checkpoint(_whole, f, weight, t, "none", use_reentrant=False)
        for f, t in zip(features.split(chunk), targets.split(chunk), strict=True)
    ]
    loss = torch.cat(losses)
    return loss if reduction == "none" else loss.sum() / (targets != NOT_SCORED).sum()
