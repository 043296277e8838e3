"""How far rules that know more would get: what can be known of an exit before the next token is.

Someone who knows what leaving at an exit costs, and may look at it for nothing, runs the fewest
loops. Here are those who know less and less: the next token itself; what the best exit says of
it; what a network makes of the states that a token has at that moment.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.audit.compare import by_document, document_of_tokens
from crt_lib.exits.policy import divergence, full_pass
from crt_lib.exits.scoring import by_token, windows_of
from crt_lib.files import InputError
from crt_lib.loss import at_least_float32
from crt_lib.model import CRT
from crt_lib.text.tokenizer import TokenizedCorpus

NETWORKS = {  # hidden widths, and whether it also reads what a head at each exit so far would say
    "a linear map of its states": ((), False),
    "a network of its states, 256": ((256,), False),
    "a network of its states, 512 x 2": ((512, 512), False),
    "a network of its states and heads, 512 x 2": ((512, 512), True),
}
KEPT_BACK = 0.2  # of the documents of valid: a network is stopped where these are guessed best
EPOCHS, BATCH, RATE = 6, 1024, 1e-3
PRICES = [-1e3, 0.0, *np.geomspace(1e-4, 1.0, 160)]  # nats a loop must save; first, all must run


@dataclass(frozen=True)
class Seen:
    """Of N tokens and the E exits up to the best, in a full pass."""

    loops: tuple[int, ...]  # of the exits
    losses: np.ndarray  # (N, E) nats
    apart: np.ndarray  # (N, E) KL(best exit || exit), nats
    states: Tensor  # (N, E - 1, d) float16, normalised
    said: Tensor  # (N, E - 1, 3) of each exit's head: the two largest probabilities, the entropy
    document: np.ndarray  # (N,)


@torch.inference_mode()
def see(
    model: CRT, data: TokenizedCorpus, split: str, seq_len: int, best: int, tokens: int | None
) -> Seen:
    """The first `tokens` of `split` (None: all), at the exits up to loop `best`."""
    ids = data.split(split).ids[:tokens]
    loops = tuple(loop for loop in model.config.head_loops if loop <= best)
    parts: list[tuple[Tensor, ...]] = []
    for inputs, targets in windows_of(model, ids, data.tokenizer.eot_id, seq_len):
        seen = [loop for loop in full_pass(model, inputs, best) if loop.number in loops]
        log_p = [loop.log_probabilities.flatten(0, 1) for loop in seen]
        states = [at_least_float32(loop.z).flatten(0, 1) for loop in seen[:-1]]
        said = [_said(p) for p in log_p[:-1]]
        parts.append(
            (
                torch.stack([loop.losses(targets).flatten() for loop in seen], -1),
                torch.stack([divergence(log_p[-1], p) for p in log_p], -1),
                torch.stack([F.layer_norm(z, z.shape[-1:]).half() for z in states], 1),
                torch.stack(said, 1),
            )
        )
    losses, apart, states_, said_ = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    document = document_of_tokens(data, split, seq_len)[0][: len(ids)]
    return Seen(loops, losses.double().numpy(), apart.double().numpy(), states_, said_, document)


def _said(log_p: Tensor) -> Tensor:
    """Of log-probabilities (N, V): the two largest probabilities, and the entropy (N, 3)."""
    p = log_p.exp()
    return torch.cat([p.topk(2).values, -(p * log_p).sum(-1, keepdim=True)], -1).float()


def gains(values: np.ndarray) -> list[np.ndarray]:
    """By exit but the last: `values` (N, E) there minus those at later exits (N, later exits)."""
    return [values[:, [e]] - values[:, e + 1 :] for e in range(values.shape[1] - 1)]


def exits_at(expected: list[np.ndarray], loops: tuple[int, ...], price: float) -> np.ndarray:
    """Where each token exits (N,), index into `loops`: where none of the later exits is expected
    to be worth its loops at `price` nats each.
    """
    exit_of = np.full(len(expected[0]), len(loops) - 1)
    for e in reversed(range(len(expected))):
        more = np.array(loops[e + 1 :]) - loops[e]
        exit_of[(expected[e] - price * more).max(1) <= 0] = e
    return exit_of


def judge(seen: Seen, expected: list[np.ndarray], fixed: int) -> dict[str, Any]:
    """The rule `exits_at` at its best price, chosen on this very text, so it is the most
    that this rule gets of these expectations.

    `loops`: the fewest a token at which it loses no more than exit `fixed`.
    `knows`: the most nats that it saves over a random mix of two fixed exits of as many loops, with
    the 95 % interval over documents, at `at` loops.
    """
    loops, losses = np.array(seen.loops), seen.losses
    limit = losses[:, seen.loops.index(fixed)].mean()
    fewest, best = float(fixed), (-np.inf, 0.0, np.zeros(len(losses)))
    for price in PRICES:
        exit_of = exits_at(expected, seen.loops, price)
        own, mean = losses[np.arange(len(losses)), exit_of], float(loops[exit_of].mean())
        if own.mean() <= limit:
            fewest = min(mean, fewest)
        saved = of_mix(losses, loops, mean) - own
        best = max(best, (saved.mean(), mean, saved), key=lambda found: found[0])
    (over,) = by_document(seen.document, best[2][:, None])
    return {"loops": fewest, "knows": over.mean, "low": over.low, "high": over.high, "at": best[1]}


def of_mix(losses: np.ndarray, loops: np.ndarray, mean: float) -> np.ndarray:
    """The losses (N,) to be expected of the best random mix of two fixed exits of `mean` loops."""
    found = []
    for i in range(len(loops)):
        for j in range(i, len(loops)):
            if loops[i] <= mean <= loops[j]:
                late = (mean - loops[i]) / (loops[j] - loops[i]) if i < j else 0.0
                found.append((1 - late) * losses[:, i] + late * losses[:, j])
    return min(found, key=np.mean)


def guesses_of(fit: Seen, seen: Seen, widths: tuple[int, ...], heads: bool) -> list[np.ndarray]:
    """`gains` of KL in `seen`, as a network of `widths` for each exit guesses them.

    It learns them from `fit`, but for the last documents, which say when it guesses best.
    """
    kept_back = torch.from_numpy(fit.document >= (1 - KEPT_BACK) * (fit.document[-1] + 1))
    if not kept_back.any():
        raise InputError("too few documents to learn from: give more tokens of valid")
    found = []
    for e, gained in enumerate(gains(fit.apart)):
        x, y = (_read(own, e, heads) for own in (fit, seen)), torch.from_numpy(gained).float()
        mean, scale = y[~kept_back].mean(0), y[~kept_back].std(0)
        own, others = x
        guess = _fitted(own, (y - mean) / scale, kept_back, widths)(others)
        found.append((guess * scale + mean).double().numpy())
    return found


def _read(seen: Seen, e: int, heads: bool) -> Tensor:
    """What a network reads at the exit of index `e` (N, features): all of the exits so far."""
    states = seen.states[:, : e + 1].flatten(1).float()
    return torch.cat([states, seen.said[:, : e + 1].flatten(1)], 1) if heads else states


def _fitted(x: Tensor, y: Tensor, kept_back: Tensor, widths: tuple[int, ...]) -> nn.Module:
    sizes, layers = (x.shape[1], *widths), list[nn.Module]()
    for before, width in zip(sizes, widths, strict=False):
        layers += [nn.Linear(before, width), nn.GELU(), nn.Dropout(0.1)]
    network = nn.Sequential(*layers, nn.Linear(sizes[-1], y.shape[1]))
    x_fit, y_fit = x[~kept_back], y[~kept_back]
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(x_fit) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    least, best = float("inf"), copy.deepcopy(network)
    for _ in range(EPOCHS):
        network.train()
        for rows in torch.randperm(len(x_fit)).split(BATCH):
            F.mse_loss(network(x_fit[rows]), y_fit[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            error = F.mse_loss(network.eval()(x[kept_back]), y[kept_back]).item()
        if error < least:
            least, best = error, copy.deepcopy(network)
    return best.requires_grad_(False)


def foresight(
    model: CRT, data: TokenizedCorpus, seq_len: int, *, tokens: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each of those who know less and less, on the first `tokens` of test (None: all).

    `knows` (nats), `low`, `high`, `at`, `loops`: `judge`, against `fixed`: the earliest exit that
    on valid is no worse than full depth. Exits past the best of valid are left out. Networks learn
    on valid. Looking is free here, and the context of a token has run all those loops; a rule in
    use must be asked, and its context has exited too. What the best exit says is taken for the
    truth, as a confidence is: who has also learned where it errs may do better. Raises InputError
    where there is nothing to foresee, or too little to learn it from.
    """
    ids, eot, loops = data.valid.ids[:tokens], data.tokenizer.eot_id, model.config.head_loops
    losses = by_token(model, ids, eot, seq_len, lambda loop, to: {"loss": loop.losses(to)})["loss"]
    means = dict(zip(loops, losses[:, [k - 1 for k in loops]].mean(0, np.float64), strict=True))
    best = min(loops, key=means.__getitem__)
    fixed = next(loop for loop in loops if means[loop] <= means[loops[-1]])
    if best == loops[0]:
        raise InputError("the first exit is the best of this model: there is nothing to foresee")
    fit, test = (see(model, data, name, seq_len, best, tokens) for name in ("valid", "test"))
    torch.manual_seed(seed)
    known = {"the next token": gains(test.losses), "what the best exit says": gains(test.apart)}
    rows = [{"who": who, **judge(test, expected, fixed)} for who, expected in known.items()]
    for who, (widths, heads) in NETWORKS.items():
        rows.append({"who": who, **judge(test, guesses_of(fit, test, widths, heads), fixed)})
    of = {"tokens": len(test.losses), "learned_on": len(fit.losses)}
    return [{**row, "fixed": fixed, "best": best, **of} for row in rows]
