"""`crt gpu`, part checks: on this device the fast paths give what the slow, obvious ones give.

A check is a function of a `Bench` to what was compared, how far it is apart and how far it may be.
In float64 two orders of the same sums agree to 1e-10 of the largest value; float32 and bfloat16 get
the bounds below, all of the largest value or, where it says norm, of the whole tensor's.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crt_lib.audit.causality import causality_report
from crt_lib.audit.reference import reference_logits, reference_loss
from crt_lib.cached.memory import Memory
from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED
from crt_lib.exits.decode import Generated, Sampling, Speculation, generate
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.gpu.parts import Job, Row, Table, Unfinished
from crt_lib.loss import GPU_CHUNK_ELEMENTS, WHOLE_ELEMENTS, exit_losses, total_loss
from crt_lib.model import CRT
from crt_lib.runs.profiles import load_profile
from crt_lib.runs.trained import load_data
from crt_lib.train import train

EXACT = 1e-10  # float64
LOSS = 1e-6  # float64 but for the loss, which is computed in float32
SINGLE = 2e-5  # float32, 6e-8 a rounding, through some twenty layers
HALF = 0.05  # bfloat16 keeps 8 bits: 0.4 % a rounding, many roundings in a row, by norm
VOCABULARY = 33_278  # of the loss in chunks: WikiText-2's words
Found = tuple[str, float, float]


@dataclass(frozen=True)
class Bench:
    """Where and at which size the checks run."""

    device: torch.device
    toy: bool

    @property
    def backend(self) -> str:
        """What compiles: on a CPU only the tracing is tried, which needs no compiler."""
        return "aot_eager" if self.toy else "inductor"

    def config(self, recipe: str) -> ModelConfig:
        """A small model of the recipe, its dropout 0."""
        d, heads, vocabulary = (32, 2, 100) if self.toy else (128, 4, 1000)
        model = load_profile("smoke", recipe).model
        assert isinstance(model, ModelConfig)  # no check is of a baseline
        width = {"embed_dim": d} if recipe == "crt2" else {}
        return model.replace(d_model=d, n_heads=heads, vocab_size=vocabulary, dropout=0.0, **width)

    def model(self, recipe: str, dtype: torch.dtype = torch.float64) -> CRT:
        """Such a model in evaluation mode, no weight at the value that it begins with."""
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        model = CRT(self.config(recipe))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model.to(self.device, dtype).eval()

    def ids(self, rows: int = 3, length: int | None = None) -> Tensor:
        """Random tokens (rows, length) for the models above."""
        length = length or (24 if self.toy else 96)
        generator = torch.Generator().manual_seed(2)
        vocabulary = self.config("crt2").vocab_size
        return torch.randint(vocabulary, (rows, length), generator=generator).to(self.device)


def run_checks(job: Job) -> None:
    """Every check that has not passed yet, a row each in checks.csv; raises if one fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, job.toy)
    table = Table(job.out / "checks.csv", "check")
    for name, check in CHECKS.items():
        if any(row["passed"] == "yes" for row in table.find(name)):
            continue
        if job.left() < 2:
            raise Unfinished(f"no time was left for {name!r} and what follows")
        table.put([_row(name, check, bench)])
        row = table.find(name)[0]
        what = row["error"] or f"{row['apart']:.1e}, at most {row['bound']:.0e}"
        print(f"  {name}: {'passed' if row['passed'] == 'yes' else 'FAILED'} ({what})", flush=True)
    failed = [row["check"] for row in table.rows if row["passed"] != "yes"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}")


def _row(name: str, check: Callable[[Bench], Found], bench: Bench) -> Row:
    started = time.perf_counter()
    row: Row = {"check": name, "compared": None, "apart": None, "bound": None, "error": None}
    try:
        row["compared"], row["apart"], row["bound"] = check(bench)
        passed = row["apart"] <= row["bound"]  # false for what is not a number
    except Exception as error:  # a check may fail in any way
        row["error"], passed = f"{type(error).__name__}: {error}".splitlines()[0], False
    row["passed"] = "yes" if passed else "no"
    return row | {"device": bench.device.type, "seconds": round(time.perf_counter() - started, 2)}


def apart(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> float:
    """The largest difference as a share of the largest value of `theirs`, over all exits."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"exits {list(ours)} and {list(theirs)} are compared")
    return max(
        float((a.double() - theirs[k].double()).abs().max() / theirs[k].double().abs().max())
        for k, a in ours.items()
    )


def norm_apart(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> float:
    """The norm of the difference as a share of that of `theirs`, over all exits."""
    return max(
        float((a.double() - theirs[k].double()).norm() / theirs[k].double().norm())
        for k, a in ours.items()
    )


@torch.no_grad()
def _logits(bench: Bench) -> Found:
    worst, ids = 0.0, bench.ids()
    for recipe in ("released", "paper", "crt2"):
        model = bench.model(recipe)
        plain = reference_logits(model.state_dict(), model.config, ids)
        worst = max(worst, apart(model(ids), plain))
    return "logits of released, paper and crt2 with the plain formulas, float64", worst, EXACT


@torch.no_grad()
def _logits_single(bench: Bench) -> Found:
    worst, ids = 0.0, bench.ids()
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        plain = reference_logits(model.state_dict(), model.config, ids)
        worst = max(worst, apart(model.float()(ids), plain))
    return "float32 logits of paper and crt2 with the plain formulas in float64", worst, SINGLE


def _gradients_of(model: CRT, loss: Tensor) -> dict[int, Tensor]:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {i: g for i, g in enumerate(gradients) if g is not None}


def _gradients(bench: Bench) -> Found:
    worst, ids = 0.0, bench.ids()
    targets = ids.roll(-1, 1)
    targets[:, -1] = NOT_SCORED
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        state = dict(model.named_parameters())
        plain, _ = reference_loss(state, model.config, ids, targets, 0.3)
        theirs = _gradients_of(model, plain)
        for model.gradient_checkpointing in (False, True):
            loss = total_loss(model(ids, targets=targets), 0.3)
            worst = max(worst, apart({0: loss.detach()}, {0: plain.detach()}))
            worst = max(worst, norm_apart(_gradients_of(model, loss), theirs))
    what = "loss and gradients, recomputed or not, with the plain formulas, float64"
    return what, worst, LOSS


def _loss_in_chunks(bench: Bench) -> Found:
    generator = torch.Generator().manual_seed(3)
    elements = WHOLE_ELEMENTS if bench.toy else 2 * GPU_CHUNK_ELEMENTS
    rows, d = elements // VOCABULARY + 100, 32
    x = torch.randn(rows, d, generator=generator).to(bench.device).requires_grad_()
    w = torch.randn(VOCABULARY, d, generator=generator).to(bench.device).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), generator=generator).to(bench.device)
    targets[::7] = NOT_SCORED

    def both(loss: Tensor) -> dict[int, Tensor]:
        return {0: loss.detach(), **dict(enumerate(torch.autograd.grad(loss, [x, w]), start=1))}

    whole = both(F.cross_entropy(x @ w.T, targets, ignore_index=NOT_SCORED))
    chunks = both(*exit_losses([x], w, targets))
    what = f"loss in chunks and its gradients with whole logits, {rows} x {VOCABULARY}, float32"
    return what, norm_apart(chunks, whole), SINGLE


def _half(bench: Bench) -> Found:
    model, ids = bench.model("crt2", torch.float32), bench.ids()
    targets = ids.roll(-1, 1)

    def both() -> dict[int, Tensor]:
        loss = total_loss(model(ids, targets=targets), 0.3)
        return {-1: loss.detach(), **_gradients_of(model, loss)}

    single = both()
    with torch.autocast(bench.device.type, torch.bfloat16):
        half = both()
    what = "loss and gradients of crt2 in bfloat16 with those in float32, by norm"
    return what, norm_apart(half, single), HALF


def _compiled(bench: Bench, recipe: str, half: bool) -> Found:
    ids = bench.ids()
    targets = ids.roll(-1, 1)
    eager = bench.model(recipe, torch.float32)
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.block.compile(backend=bench.backend)

    def both(model: CRT) -> dict[int, Tensor]:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            loss = total_loss(model(ids, targets=targets), 0.3)
        return {-1: loss.detach(), **_gradients_of(model, loss)}

    worst = norm_apart(both(compiled), both(eager))
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise RuntimeError(f"nothing of {recipe} was compiled")
    kind = "bfloat16" if half else "float32"
    what = f"loss and gradients of {recipe}, block compiled ({bench.backend}) and not, {kind}, norm"
    return what, worst, HALF if half else SINGLE


def _audit(bench: Bench) -> Found:
    wrong, length = [], 8 if bench.toy else 24
    for recipe, dtype in (
        *((recipe, torch.float32) for recipe in ("released", "paper", "crt2")),
        ("crt2", torch.bfloat16),
    ):
        model = bench.model(recipe, dtype)
        report = causality_report(model, model.config.vocab_size, length=length)
        if report.leaks != (recipe == "released"):
            wrong.append(f"{recipe} in {dtype}")
    what = "the audit finds the leak of released and none in paper, crt2, crt2 in bfloat16"
    return f"{what}; wrong: {wrong}" if wrong else what, len(wrong), 0


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


def _differing(ours: list[Generated], theirs: list[Generated]) -> int:
    """Tokens and exits that are not the same."""
    return sum(
        (a.tokens[i], a.loops[i]) != (b.tokens[i], b.loops[i])
        for a, b in zip(ours, theirs, strict=True)
        for i in range(max(len(a.tokens), len(b.tokens)))
    )


def _cache(bench: Bench) -> Found:
    wrong, seen = 0, set()
    prompts = [row[: 3 + 4 * i].tolist() for i, row in enumerate(bench.ids())]
    n = 6 if bench.toy else 24
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        for policy in _policies(model, bench.ids()):
            fast = generate(model, prompts, n, policy=policy)
            wrong += _differing(fast, generate(model, prompts, n, policy=policy, cache=False))
            seen |= {loop for one in fast for loop in one.loops}
    if len(seen) < 2:
        raise RuntimeError(f"every token left after loop {seen}: exits were not tried")
    what = "tokens and exits decoded with caches and without, three prompts, exits, float64"
    return f"{what}; they left after loops {sorted(seen)}", wrong, 0


@torch.no_grad()
def _exits(bench: Bench) -> Found:
    worst, ids = 0.0, bench.ids()
    rows, length = ids.shape
    model = bench.model("crt2")
    for policy in _policies(model, ids):
        whole = run_with_exits(model, ids, policy)
        memory = Memory(model.config, rows, length, model.loop_encoding)
        steps = [run_with_exits(model, column, policy, memory) for column in ids.split(1, 1)]
        worst = max(worst, apart({0: torch.cat([s.logits for s in steps], 1)}, {0: whole.logits}))
        worst += int((torch.cat([s.loops for s in steps], 1) != whole.loops).sum())
        if policy.fixed:
            own = model(ids, (policy.fixed,))[policy.fixed]
            worst = max(worst, apart({0: whole.logits}, {0: own}))
    return "logits with exits: a window at once, token by token, and the exit's own", worst, EXACT


@torch.no_grad()
def _decode_half(bench: Bench) -> Found:
    model, ids = bench.model("crt2", torch.bfloat16), bench.ids()
    whole = model(ids, (model.config.n_loops,))[model.config.n_loops]
    memory = Memory(model.config, len(ids), ids.shape[1], model.loop_encoding)
    steps = [run_with_exits(model, column, Policy(), memory).logits for column in ids.split(1, 1)]
    what = "bfloat16 logits of crt2 token by token with those of a forward pass, by norm"
    return what, norm_apart({0: torch.cat(steps, 1)}, {0: whole}), HALF


def _speculation(bench: Bench) -> Found:
    wrong, kept, drafted = 0, 0, 0
    prompt, n = bench.ids(1, 9)[0].tolist(), 12 if bench.toy else 48
    for recipe in ("paper", "crt2"):
        model = bench.model(recipe)
        plain = generate(model, [prompt], n)
        for loop in model.config.exit_loops:
            made = Speculation(model, loop).generate(prompt, n)
            wrong += _differing([made], plain)
            kept, drafted = kept + made.accepted, drafted + made.drafted
    if not 0 < kept < drafted:
        raise RuntimeError(f"{kept} of {drafted} drafts were kept: one outcome was not tried")
    what = "speculation from every exit with greedy decoding, float64"
    return f"{what}; {kept} of {drafted} drafts kept", wrong, 0


def _sampling(bench: Bench) -> Found:
    model, prompts = bench.model("crt2", torch.float32), bench.ids(2, 5).tolist()
    sampling = Sampling(1.0, top_p=0.9)
    once, again = (generate(model, prompts, 12, sampling=sampling, seed=4) for _ in range(2))
    return "sampled tokens of one seed, twice", _differing(once, again), 0


def _training(bench: Bench) -> Found:
    profile = load_profile("smoke")
    data = load_data(profile)
    precision = "fp32" if bench.toy else "bf16"
    settings = profile.train.replace(precision=precision, updates=40, eval_every=10)
    model = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(model, settings, data, folder, progress=False).metrics
    name = f"valid_loss_{model.n_loops}"
    losses = [row[name] for row in metrics if name in row]
    entropy = data.corpus.entropy
    what = f"40 updates in {precision}: loss {losses[0]:.2f}, then {losses[-1]:.2f}; it falls, and "
    what += f"not below the language's entropy, {entropy:.2f}"
    return what, max(losses[-1] - losses[0], entropy - losses[-1]), 0


CHECKS: dict[str, Callable[[Bench], Found]] = {
    "logits": _logits,
    "logits in float32": _logits_single,
    "gradients": _gradients,
    "loss in chunks": _loss_in_chunks,
    "bfloat16": _half,
    "compiled": lambda bench: _compiled(bench, "paper", half=False),
    "compiled, bfloat16": lambda bench: _compiled(bench, "crt2", half=True),
    "audit": _audit,
    "decoding with caches": _cache,
    "exits": _exits,
    "decoding, bfloat16": _decode_half,
    "speculation": _speculation,
    "sampling": _sampling,
    "training": _training,
}
