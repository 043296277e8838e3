"""`crt gpu`, part checks: on this device the fast paths give what the slow, obvious ones give.

A check is a function of a `Bench` to pairs of tensors. They are apart by the norm of their
difference over that of the second, at most by the check's bound.
"""

import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.audit.causality import causality_report
from crt_lib.audit.reference import reference_logits, reference_loss
from crt_lib.bench.table import put_rows, rows_of
from crt_lib.gpu import decoding
from crt_lib.gpu.decoding import Bench, Pairs
from crt_lib.gpu.parts import Job, Row, say
from crt_lib.loss import GPU_CHUNK_ELEMENTS, WHOLE_ELEMENTS, exit_losses
from crt_lib.runs.profiles import load_profile
from crt_lib.runs.run import Run, load_data, run_profile

EXACT = 1e-10  # float64, two orders of the same sums
LOSS = 1e-6  # float64 but for the loss, which is computed in float32
SINGLE = 2e-5  # float32, 6e-8 a rounding, through some twenty layers
HALF = 0.05  # bfloat16 keeps 8 bits: 0.4 % a rounding, many roundings in a row
VOCABULARY = 33_278  # of the loss in chunks: WikiText-2's words


def run_checks(job: Job) -> None:
    """Every check that has not passed yet, a row each in checks.csv; raises if one fails."""
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), job.toy)
    table = job.out / "checks.csv"
    for name in CHECKS:
        if not rows_of(table, check=name, passed="yes"):
            row = _row(name, bench)
            put_rows(table, [row], ["check"])
            said = f"{row['apart']}, at most {row['bound']}; {row['error'] or 'no error'}"
            say(f"  {name}: passed {row['passed']} ({said})")
    failed = [row["check"] for row in rows_of(table, passed="no")]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}")


def _row(name: str, bench: Bench) -> Row:
    check, bound, options = CHECKS[name]
    row: Row = {"check": name, "compared": check.__doc__, "apart": None, "bound": bound}
    row |= {"error": None, "passed": "no", "device": bench.device.type}
    try:
        row["apart"] = worst_apart(check(bench, **options))
        row["passed"] = "yes" if row["apart"] <= bound else "no"
    except Exception as error:  # a check may fail in any way
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def worst_apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest of what the pairs are apart; infinite where one is not a number."""
    worst = 0.0
    for ours, theirs in pairs:
        difference = (ours.double() - theirs.double()).norm()
        apart = float(difference / theirs.double().norm().clamp(min=1e-300))
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def _graphs(bench: Bench) -> Pairs:
    """Loss and gradients from CUDA graphs, the weights changed in between, with the plain ones."""
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe, torch.float32)
        graphed = bench.graphed(model)
        for _ in range(2):
            yield from zip(
                _learned(model, graphed()), _learned(model, bench.loss(model)), strict=True
            )
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)


@torch.no_grad()
def _logits(bench: Bench, dtype: torch.dtype) -> Pairs:
    """Logits of released, paper and crt2 with the plain formulas in float64."""
    for recipe in ("released", "paper", "crt2"):
        model = bench.model(recipe)
        plain = reference_logits(model.state_dict(), model.config, bench.ids())
        yield from zip(model.to(dtype)(bench.ids()).values(), plain.values(), strict=True)


def _learned(model: nn.Module, loss: Tensor) -> list[Tensor]:
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
    drawn: dict[str, Any] = {"generator": generator, "device": bench.device}
    elements = WHOLE_ELEMENTS if bench.toy else 2 * GPU_CHUNK_ELEMENTS
    rows, d = elements // VOCABULARY + 100, 32
    x, w = (torch.randn(n, d, **drawn).requires_grad_() for n in (rows, VOCABULARY))
    targets = torch.randint(VOCABULARY, (rows,), **drawn)
    targets[::7] = -100  # not scored, for torch as for us
    whole = F.cross_entropy(x @ w.T, targets)
    (chunks,) = exit_losses([x], w, targets)
    yield chunks.detach(), whole.detach()
    yield from zip(*(torch.autograd.grad(loss, [x, w]) for loss in (chunks, whole)), strict=True)


def _otherwise(bench: Bench, recipe: str, half: bool, compiled: bool) -> Pairs:
    """Loss and gradients in bfloat16 or by a compiled block with those in float32, eager."""
    model = bench.model(recipe, torch.float32)
    plain = _learned(model, bench.loss(model))
    if compiled:  # on a CPU only the tracing is tried, which needs no compiler
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.block.compile(backend="aot_eager" if bench.toy else "inductor")
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
        loss = bench.loss(model)
    learned = _learned(model, loss)
    if compiled and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise RuntimeError(f"nothing of {recipe} was compiled")
    yield from zip(learned, plain, strict=True)


def _audit(bench: Bench) -> Pairs:
    """The audit finds the leak of released and none in paper, crt2, crt2 in bfloat16."""
    recipes = [(recipe, torch.float32) for recipe in ("released", "paper", "crt2")]
    for recipe, dtype in (*recipes, ("crt2", torch.bfloat16)):
        model = bench.model(recipe, dtype)
        few = {"length": 8, "context": 16} if bench.toy else {}
        report = causality_report(model, model.config.vocab_size, seconds=2.0, **few)
        yield torch.tensor(float(report.leaks)), torch.tensor(float(recipe == "released"))


def _training(bench: Bench) -> Pairs:
    """The loss of 40 updates falls, and not below the language's entropy: by how much it does."""
    profile = load_profile("smoke")
    precision = "fp32" if bench.toy else "bf16"
    settings = profile.train.replace(precision=precision, updates=40, eval_every=10)
    with tempfile.TemporaryDirectory() as folder:
        run = run_profile(profile.replace(train=settings), folder, progress=False)
    assert isinstance(run, Run)  # nothing has stopped it
    column = f"valid_loss_{profile.model.n_loops}"
    losses = [row[column] for row in run.metrics if column in row]
    floor = load_data(profile).corpus.entropy or 0.0
    yield torch.tensor(max(losses[-1] - losses[0], floor - losses[-1], 0.0)), torch.zeros(())


CHECKS: dict[str, tuple[Callable[..., Pairs], float, dict[str, Any]]] = {
    "logits": (_logits, EXACT, {"dtype": torch.float64}),
    "logits in float32": (_logits, SINGLE, {"dtype": torch.float32}),
    "gradients": (_gradients, LOSS, {}),
    "loss in chunks": (_loss_in_chunks, SINGLE, {}),
    "bfloat16": (_otherwise, HALF, {"recipe": "crt2", "half": True, "compiled": False}),
    "compiled": (_otherwise, SINGLE, {"recipe": "paper", "half": False, "compiled": True}),
    "compiled, bfloat16": (_otherwise, HALF, {"recipe": "crt2", "half": True, "compiled": True}),
    "CUDA graphs": (_graphs, SINGLE, {}),
    "audit": (_audit, 0.0, {}),
    "decoding with caches": (decoding.cache, 0.0, {}),
    "exits": (decoding.exits, EXACT, {}),
    "decoding, bfloat16": (decoding.in_half, HALF, {}),
    "speculation": (decoding.speculation, 0.0, {}),
    "training": (_training, 0.0, {}),
}
