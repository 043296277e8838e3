"""Cross-entropy of a vocabulary projection without the full logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crt_lib.batches import NOT_SCORED

WHOLE_ELEMENTS = 1 << 24  # logits that are computed at once: 64 MiB in float32
CHUNK_ELEMENTS = 1 << 22  # logits a chunk where there are more
GPU_CHUNK_ELEMENTS = 1 << 25  # on a GPU, which a small chunk would leave waiting for the next
FUSED_WEIGHTS = 1 << 22  # up to this size, its gradient is kept from the forward pass on a CPU
FUSED_ROWS = 256  # positions a chunk there: 8 MiB of logits for a vocabulary of 8,192


def linear_cross_entropy(
    features: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """-log softmax(features @ weight.T)[target] in nats (eq. 4), a chunk of positions at a time.

    features (..., d), weight (V, d), targets (...) with NOT_SCORED where nothing is scored.
    `reduction`: "mean" over the scored positions, or "none" for the shape of `targets`, zero where
    ignored. Equals cross_entropy(linear(features, weight), targets).
    """
    shape = targets.shape
    targets = targets.reshape(-1)
    features = features.reshape(-1, features.shape[-1])
    device = features.device.type
    elements = CHUNK_ELEMENTS if device == "cpu" else GPU_CHUNK_ELEMENTS
    chunk = max(1, elements // weight.shape[0])
    half = torch.is_autocast_enabled(device)
    learns = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    dtype = torch.get_autocast_dtype(device) if half else weight.dtype
    fused = weight.numel() <= FUSED_WEIGHTS and dtype != torch.float16  # it would underflow there
    if device == "cpu" and learns and reduction == "mean" and fused:
        loss = _FusedMean.apply(features, weight, targets, dtype)
    elif targets.numel() * weight.shape[0] <= WHOLE_ELEMENTS:
        loss = _whole(features, weight, targets, reduction)
    elif not _TORCH_CHUNKS or (half and device == "cpu"):
        # on a CPU torch's chunks compute half precision as float32: recomputing is faster
        loss = _checkpointed_chunks(features, weight, targets, reduction, chunk)
    else:
        loss = _torch_chunks(features.to(dtype), weight.to(dtype), targets, reduction, chunk)
    return loss if reduction == "mean" else loss.view(shape)


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 where they are already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _whole(features: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    logits = at_least_float32(F.linear(features, weight))
    return F.cross_entropy(logits, targets, ignore_index=NOT_SCORED, reduction=reduction)


class _FusedMean(torch.autograd.Function):
    """The mean loss and both gradients in one pass, while a chunk's logits are in the cache.

    With p = softmax(z), the gradient of the mean by the logits z is (p - onehot(target)) / scored.
    """

    @staticmethod
    def forward(ctx, features, weight, targets, dtype):
        scored = targets != NOT_SCORED
        count = scored.sum()
        targets = targets.clamp(min=0)[:, None]
        matrix = weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=wide)
        by_features = torch.empty_like(features)
        by_weight = torch.zeros_like(weight)
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
            by_weight += z.T @ inputs
        ctx.save_for_backward(by_features, by_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        by_features, by_weight = ctx.saved_tensors
        return by_features * gradient, by_weight * gradient, None, None


def _torch_chunks(
    features: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk: int
) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(  # compact: no second (V, d) gradient buffer
        batch_chunk_size=chunk, chunking_method=None, acc_policy="compact", acc_dtype=torch.float32
    )
    return F.linear_cross_entropy(
        features, weight, targets, ignore_index=NOT_SCORED, reduction=reduction, options=options
    )


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


_TORCH_CHUNKS = hasattr(F, "linear_cross_entropy")
