"""Padded rows as transformers gives them: where a row's tokens are, and turning rows."""

import torch
from torch import Tensor

from crt_lib.files import InputError
from crt_lib.hf.cache import CRTCache


def padding_of(mask: Tensor | None, inputs: Tensor, cache: CRTCache | None) -> Tensor | None:
    """How many padding tokens each row has on its left (B,), None where no row has any.

    Raises InputError for a mask of another shape, with zeros among a row's tokens, or that is not
    what the cache was filled with.
    """
    if mask is None:
        return None
    done = cache.get_seq_length() if cache is not None else 0
    wanted = inputs.shape[0], done + inputs.shape[1]
    if mask.shape != wanted:
        raise InputError(
            f"attention_mask is {tuple(mask.shape)}; give {wanted}, ones for tokens and zeros for "
            "padding"
        )
    mask = mask != 0
    lengths = mask.sum(1)
    starts = mask.int().argmax(1)
    at = torch.arange(mask.shape[1], device=mask.device)
    whole = (at >= starts[:, None]) & (at < (starts + lengths)[:, None])
    if not bool((whole == mask).all()):
        raise InputError(
            "attention_mask has zeros between a row's tokens; pad on the left or right"
        )
    starts = torch.where(lengths > 0, starts, mask.shape[1])
    if cache is not None and done:
        cache.check_starts(starts)
    return starts if bool(starts.any()) else None


def rotate_rows(x: Tensor, by: Tensor) -> Tensor:
    """Each row of x (B, T, ...) turned to the left by `by` (B,) positions, the first to the end."""
    at = torch.arange(x.shape[1], device=x.device)
    index = (at + by[:, None]) % x.shape[1]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
