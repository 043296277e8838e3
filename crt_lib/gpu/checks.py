"""`crt gpu`, part checks: on this device the fast paths give what the slow, obvious ones give.

A check is a function of a `Bench` to pairs of tensors. They are apart by the norm of their
difference over that of the second, at most by the check's bound. In float64 two orders of the same
sums agree to 1e-10.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.causality import causality_report
from crt_lib.audit.reference import reference_logits, reference_loss
from crt_lib.bench.table import Table
from crt_lib.cached.memory import Memory
from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED
from crt_lib.exits.decode import Generated, Sampling, Speculation, generate
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.gpu.parts import Job, Row, say
from crt_lib.loss import GPU_CHUNK_ELEMENTS, WHOLE_ELEMENTS, exit_losses, total_loss
from crt_lib.model import CRT
from crt_lib.runs.profiles import load_profile
from crt_lib.runs.run import load_data
from crt_lib.train import train

EXACT = 1e-10  # float64
LOSS = 1e-6  # float64 but for the loss, which is computed in float32
SINGLE = 2e-5  # float32, 6e-8 a rounding, through some twenty layers
HALF = 0.05  # bfloat16 keeps 8 bits: 0.4 % a rounding, many roundings in a row
VOCABULARY = 33_278  # of the loss in chunks: WikiText-2's words
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

    def ids(self, rows: int = 3) -> Tensor:
        """Tokens (rows, length) for the models."""
        generator, length = torch.Generator().manual_seed(2), 24 if self.toy else 96
        return torch.randint(100, (rows, length), generator=generator).to(self.device)

    def targets(self) -> Tensor:
        """What follows the tokens, the last not scored."""
        targets = self.ids().roll(-1, 1)
        targets[:, -1] = NOT_SCORED
        return targets

    def loss(self, model: CRT) -> Tensor:
        """Eq. 5 on the tokens."""
        return total_loss(model(self.ids(), targets=self.targets()), 0.3)


def run_checks(job: Job) -> None:
    """Every check that has not passed yet, a row each in checks.csv; raises if one fails."""
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), job.toy)
    table = Table(job.out / "checks.csv", "check")
    for name in CHECKS:
        if any(row["passed"] == "yes" for row in table.find(name)):
            continue
        row = _row(name, bench)
        table.put([row])
        what = row["error"] or f"{row['apart']:.1e}, at most {row['bound']:.0e}"
        say(f"  {name}: {'passed' if row['passed'] == 'yes' else 'FAILED'} ({what})")
    failed = [row["check"] for row in table.rows if row["passed"] != "yes"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}")


def _row(name: str, bench: Bench) -> Row:
    check, bound, options = CHECKS[name]
    row: Row = {"check": name, "compared": check.__doc__, "apart": None, "bound": bound}
    row["error"], started, passed = None, time.perf_counter(), False
    try:
        row["apart"] = worst_apart(check(bench, **options))
        passed = row["apart"] <= bound
    except Exception as error:  # a check may fail in any way
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["passed"] = "yes" if passed else "no"
    return row | {"device": bench.device.type, "seconds": round(time.perf_counter() - started, 2)}


def worst_apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest of what the pairs are apart; infinite where one is not a number."""
    worst = 0.0
    for ours, theirs in pairs:
        difference = (ours.double() - theirs.double()).norm()
        apart = float(difference / theirs.double().norm().clamp(min=1e-300))
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst


@torch.no_grad()
def _logits(bench: Bench, dtype: torch.dtype) -> Pairs:
    """Logits of released, paper and crt2 with the plain formulas in float64."""
    for recipe in ("released", "paper", "crt2"):
        model = bench.model(recipe)
        plain = reference_logits(model.state_dict(), model.config, bench.ids())
        yield from zip(model.to(dtype)(bench.ids()).values(), plain.values(), strict=True)


def _learned(model: CRT, loss: Tensor) -> list[Tensor]:
    """A loss and its gradients."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def _gradients(bench: Bench) -> Pairs:
    """Loss and gradients of paper and crt2, recomputed or not, with the plain formulas."""
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        state, ids = dict(model.named_parameters()), bench.ids()
        plain = reference_loss(state, model.config, ids, bench.targets(), 0.3)[0]
        theirs = _learned(model, plain)
        for model.gradient_checkpointing in (False, True):
            yield from zip(_learned(model, bench.loss(model)), theirs, strict=True)


def _loss_in_chunks(bench: Bench) -> Pairs:
    """The loss in chunks and its gradients with those of whole logits, float32."""
    generator = torch.Generator(bench.device).manual_seed(3)
    drawn = {"generator": generator, "device": bench.device}
    elements = WHOLE_ELEMENTS if bench.toy else 2 * GPU_CHUNK_ELEMENTS
    rows, d = elements // VOCABULARY + 100, 32
    x, w = (torch.randn(n, d, **drawn).requires_grad_() for n in (rows, VOCABULARY))
    targets = torch.randint(VOCABULARY, (rows,), **drawn)
    targets[::7] = NOT_SCORED
    whole = F.cross_entropy(x @ w.T, targets, ignore_index=NOT_SCORED)
    (chunks,) = exit_losses([x], w, targets)
    yield chunks.detach(), whole.detach()
    yield from zip(*(torch.autograd.grad(loss, [x, w]) for loss in (chunks, whole)), strict=True)


def _otherwise(bench: Bench, recipe: str, half: bool, compiled: bool) -> Pairs:
    """Loss and gradients in bfloat16 or by a compiled block with those in float32, eager."""
    model = bench.model(recipe, torch.float32)
    plain = _learned(model, bench.loss(model))
    if compiled:  # on a CPU only the tracing is tried, which needs no compiler
        torch._dynamo.reset()
        model.block.compile(backend="aot_eager" if bench.toy else "inductor")
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
        loss = bench.loss(model)
    yield from zip(_learned(model, loss), plain, strict=True)


def _audit(bench: Bench) -> Pairs:
    """The audit finds the leak of released and none in paper, crt2, crt2 in bfloat16."""
    recipes = [(recipe, torch.float32) for recipe in ("released", "paper", "crt2")]
    for recipe, dtype in (*recipes, ("crt2", torch.bfloat16)):
        model = bench.model(recipe, dtype)
        report = causality_report(model, model.config.vocab_size, length=8 if bench.toy else 24)
        yield torch.tensor(float(report.leaks)), torch.tensor(float(recipe == "released"))


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


def _cache(bench: Bench) -> Pairs:
    """Tokens and exits decoded with caches and without, three prompts, exits, float64."""
    prompts = [row[: 3 + 4 * i].tolist() for i, row in enumerate(bench.ids())]
    n = 6 if bench.toy else 24
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        for policy in _policies(model, bench.ids()):
            slow = generate(model, prompts, n, policy=policy, cache=False)
            yield _text(generate(model, prompts, n, policy=policy)), _text(slow)


@torch.no_grad()
def _by_token(model: CRT, ids: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Logits and loops, a token at a time."""
    memory = Memory(model.config, *ids.shape, model.loop_encoding)
    steps = [run_with_exits(model, column, policy, memory) for column in ids.split(1, 1)]
    return torch.cat([s.logits for s in steps], 1), torch.cat([s.loops for s in steps], 1)


@torch.no_grad()
def _exits(bench: Bench) -> Pairs:
    """Logits and loops with exits: token by token and the exit's own, with a window at once."""
    model, ids = bench.model("crt2"), bench.ids()
    for policy in _policies(model, ids):
        whole = run_with_exits(model, ids, policy)
        yield from zip(_by_token(model, ids, policy), (whole.logits, whole.loops), strict=True)
        if policy.fixed:
            yield model(ids, (policy.fixed,))[policy.fixed], whole.logits


@torch.no_grad()
def _decode_half(bench: Bench) -> Pairs:
    """bfloat16 logits of crt2 token by token with those of a forward pass."""
    model, ids = bench.model("crt2", torch.bfloat16), bench.ids()
    last = model.config.n_loops
    yield _by_token(model, ids, Policy())[0], model(ids, (last,))[last]


def _speculation(bench: Bench) -> Pairs:
    """Speculation from every exit with greedy decoding, float64."""
    prompt, n = bench.ids(1)[0, :9].tolist(), 12 if bench.toy else 48
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        plain = _text(generate(model, [prompt], n))
        for loop in model.config.exit_loops:
            yield _text([Speculation(model, loop).generate(prompt, n)]), plain


def _sampling(bench: Bench) -> Pairs:
    """Sampled tokens of one seed, twice."""
    model, prompts = bench.model("crt2", torch.float32), bench.ids(2)[:, :5].tolist()
    sampling = Sampling(1.0, top_p=0.9)
    once, again = (generate(model, prompts, 12, sampling=sampling, seed=4) for _ in range(2))
    yield _text(once), _text(again)


def _training(bench: Bench) -> Pairs:
    """The loss of 40 updates falls, and not below the language's entropy: by how much it does."""
    profile = load_profile("smoke")
    data = load_data(profile)
    precision = "fp32" if bench.toy else "bf16"
    settings = profile.train.replace(precision=precision, updates=40, eval_every=10)
    model = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(model, settings, data, folder, progress=False).metrics
    losses = [loss for row in metrics if (loss := row.get(f"valid_loss_{model.n_loops}"))]
    entropy = data.corpus.entropy
    assert entropy is not None  # the profile's language has one
    yield torch.tensor(max(losses[-1] - losses[0], entropy - losses[-1], 0.0)), torch.zeros(())


CHECKS: dict[str, tuple[Callable[..., Pairs], float, dict[str, Any]]] = {
    "logits": (_logits, EXACT, {"dtype": torch.float64}),
    "logits in float32": (_logits, SINGLE, {"dtype": torch.float32}),
    "gradients": (_gradients, LOSS, {}),
    "loss in chunks": (_loss_in_chunks, SINGLE, {}),
    "bfloat16": (_otherwise, HALF, {"recipe": "crt2", "half": True, "compiled": False}),
    "compiled": (_otherwise, SINGLE, {"recipe": "paper", "half": False, "compiled": True}),
    "compiled, bfloat16": (_otherwise, HALF, {"recipe": "crt2", "half": True, "compiled": True}),
    "audit": (_audit, 0.0, {}),
    "decoding with caches": (_cache, 0.0, {}),
    "exits": (_exits, EXACT, {}),
    "decoding, bfloat16": (_decode_half, HALF, {}),
    "speculation": (_speculation, 0.0, {}),
    "sampling": (_sampling, 0.0, {}),
    "training": (_training, 0.0, {}),
}
