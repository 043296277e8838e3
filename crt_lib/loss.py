"""Cross-entropy of a vocabulary projection without the full logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crt_lib.batches import NOT_SCORED

WHOLE_ELEMENTS = 1 << 24  # logits that are computed at once: 64 MiB in float32
CHUNK_ELEMENTS = 1 << 22  # logits a chunk where there are more


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
    chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
    device = features.device.type
    half = torch.is_autocast_enabled(device)
    if targets.numel() * weight.shape[0] <= WHOLE_ELEMENTS:
        loss = _whole(features, weight, targets, reduction)
    elif not _TORCH_CHUNKS or (half and device == "cpu"):
        # on a CPU torch's chunks compute half precision as float32: recomputing is faster
        loss = _checkpointed_chunks(features, weight, targets, reduction, chunk)
    else:
        dtype = torch.get_autocast_dtype(device) if half else weight.dtype
        loss = _torch_chunks(features.to(dtype), weight.to(dtype), targets, reduction, chunk)
    return loss if reduction == "mean" else loss.view(shape)


def _whole(features: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    logits = F.linear(features, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=NOT_SCORED, reduction=reduction)


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
