"""The usual causes of a leak, and the lines of code that are right instead."""

_MASK = (
    "attention without a causal mask, or with one that is a position too far to the right",
    "F.scaled_dot_product_attention(q, k, v, is_causal=True)\n"
    "mask = torch.ones(T, T, dtype=torch.bool).tril()  # tril(0): t sees 0..t",
)
_CONVOLUTION = (
    "a convolution that is padded on both sides",
    "x = F.conv1d(F.pad(x, ((kernel - 1) * dilation, 0)), weight, dilation=dilation)",
)
_STATISTICS = (
    "a mean, maximum or norm over time (batch, group and instance norm, pooling, scaling by the "
    "whole row)",
    "nn.LayerNorm(d)  # over the features of each position alone\n"
    "x.cumsum(1) / torch.arange(1, T + 1, device=x.device)[:, None]  # of what has come",
)
_BATCH_NORM = (
    "a batch norm over time: causal in evaluation, not in training",
    "nn.LayerNorm(d)  # in place of nn.BatchNorm1d(d)",
)
_LENGTH = (
    "something that depends on how long the row is: positions counted from its end, division by "
    "its length, an FFT without room",
    "torch.fft.rfft(x, 2 * T, dim=1)  # and keep the first T of the inverse",
)
_FAR = (
    "something that holds at certain positions alone: blocks or windows that look ahead inside "
    "themselves, a mask that is shorter than the row",
    "mask = torch.ones(T, T, dtype=torch.bool).tril()  # of T, not of a fixed length",
)
_TOKEN = (
    "a token that is looked for in the whole row, as padding or an end of text often is",
    "document = (ids == end).cumsum(1)  # of what has come; not (ids == end).any(1)",
)
_LABELS = (
    "logits or a loss that are computed from the labels",
    "loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())",
)
_ROWS = (
    "a sum, norm or choice over the rows of a batch: a reduction over dim 0, a reshape that mixes "
    "rows, experts that choose tokens",
    "weights, chosen = router(x).topk(k, dim=-1)  # each token chooses; no capacity\n"
    "x.view(B, T, heads, -1).transpose(1, 2)  # B stays first",
)
_CACHE = (
    "positions that are counted anew in each step, or a cache that keeps too little",
    "positions = torch.arange(past, past + new)",
)
_PADDING = (
    "positions that count the padding, or a mask that is not used everywhere",
    "position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)",
)
_CAUSES = {  # those of the first group whose probe convicts, and of the groups of other kinds
    "tokens": (_MASK, _CONVOLUTION, _STATISTICS),
    "gradient": (_MASK, _CONVOLUTION, _STATISTICS),
    "far": (_FAR, _MASK),
    "training": (_BATCH_NORM,),
    "vocabulary": (_TOKEN,),
    "prefix": (_LENGTH,),
    "lengths": (_LENGTH,),
}
_APART = {
    "labels": _LABELS,
    "rows": _ROWS,
    "count": _ROWS,
    "decode": _CACHE,
    "padding": _PADDING,
}


def advice_for(convicting: list[str]) -> list[tuple[str, str]]:
    """Of the probes that convict: causes, the most usual first, each with lines of code."""
    first = next((causes for name, causes in _CAUSES.items() if name in convicting), ())
    apart = (cause for name, cause in _APART.items() if name in convicting)
    return list(dict.fromkeys([*first, *apart]))
