"""`crt gpu`, checks of decoding."""

from collections.abc import Iterable

import torch
from torch import Tensor

from crt_lib.cached.memory import Memory
from crt_lib.exits.decode import Generated, Speculation, generate
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.gpu.small import Bench, Pairs
from crt_lib.model import CRT


def _policies(model: CRT, ids: Tensor) -> list[Policy]:
    """Full depth, a fixed exit, and a threshold that about half of the tokens pass at the first.

    It lies between two scores: at one of them, rounding would decide whether that token exits.
    """
    first = model.config.exit_loops[0]
    with torch.no_grad():
        scores = model(ids, (first,))[first].softmax(-1).amax(-1).flatten().sort().values
    half = len(scores) // 2
    tau = float(scores[half - 1 : half + 1].mean())
    return [Policy(), Policy(fixed=first), Policy("confidence", tau, tau, 1.0)]


def _text(made: Iterable[Generated]) -> Tensor:
    """Tokens and exits."""
    return torch.tensor([[one.tokens, one.loops] for one in made])


def cache(bench: Bench) -> Pairs:
    """Tokens and exits decoded with caches and without, three prompts, exits, float64."""
    prompts = [row[: 3 + 4 * i].tolist() for i, row in enumerate(bench.ids())]
    n, seen = 6 if bench.toy else 24, set()
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        for policy in _policies(model, bench.ids()):
            fast = generate(model, prompts, n, policy=policy)
            slow = generate(model, prompts, n, policy=policy, cache=False)
            seen |= {loop for one in fast for loop in one.loops}
            yield _text(fast), _text(slow)
    if len(seen) < 2:
        raise RuntimeError(f"every token exited after loop {seen}: exits were not tried")


@torch.no_grad()
def _by_token(model: CRT, ids: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Logits and loops, a token at a time."""
    memory = Memory(model.config, len(ids), ids.shape[1], model.loop_encoding)
    steps = [run_with_exits(model, column, policy, memory) for column in ids.split(1, 1)]
    return torch.cat([s.logits for s in steps], 1), torch.cat([s.loops for s in steps], 1)


@torch.no_grad()
def exits(bench: Bench) -> Pairs:
    """Logits and loops with exits: token by token and the exit's own, with a window at once."""
    model, ids = bench.model("crt2"), bench.ids()
    for policy in _policies(model, ids):
        whole = run_with_exits(model, ids, policy)
        yield from zip(_by_token(model, ids, policy), (whole.logits, whole.loops), strict=True)
        if policy.fixed:
            yield model(ids, (policy.fixed,))[policy.fixed], whole.logits


@torch.no_grad()
def in_half(bench: Bench) -> Pairs:
    """bfloat16 logits of crt2 token by token with those of a forward pass."""
    model, ids = bench.model("crt2", torch.bfloat16), bench.ids()
    yield _by_token(model, ids, Policy())[0], model(ids)[model.config.n_loops]


def speculation(bench: Bench) -> Pairs:
    """Speculation from every exit with greedy decoding, float64."""
    prompt, n = bench.ids()[0, :9].tolist(), 12 if bench.toy else 48
    kept = drafted = 0
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        plain = _text(generate(model, [prompt], n))
        for loop in model.config.exit_loops:
            made = Speculation(model, loop).generate(prompt, n)
            kept, drafted = kept + made.accepted, drafted + made.drafted
            yield _text([made]), plain
    if not 0 < kept < drafted:
        raise RuntimeError(f"{kept} of {drafted} drafts were kept: one outcome was not tried")
