"""What `crt gpu` checks: on a device the fast paths give what the slow, obvious ones give.

A check is a function of the device to pairs of tensors, that of the fast path first; what is
not of a GPU is of a toy size. `crt_lib.gpu.checks` says how far apart they are.
"""

import tempfile
from unittest import mock

import torch

from crt_lib import CRT, causality_report, load_profile
from crt_lib.audit.reference import reference_logits, reference_loss
from crt_lib.cached.memory import Memory
from crt_lib.device import Precision
from crt_lib.exits import speculate
from crt_lib.exits.decode import generate
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.exits.speculate import Speculation
from crt_lib.loss import total_loss
from crt_lib.runs.graphs import GraphedLosses
from crt_lib.runs.run import load_data, run_profile

EXACT = 1e-10  # float64, two orders of the same sums
LOSS = 1e-6  # float64 but for the loss, which is computed in float32
SINGLE = 2e-5  # float32, 6e-8 a rounding, through some twenty layers
HALF = 0.05  # bfloat16 keeps 8 bits: 0.4 % a rounding, many roundings in a row
AUX = 0.3
BOTH = ("paper", "crt2")


def small(recipe, device, dtype=torch.float64):
    """A model in evaluation mode, no weight at the value that it begins with, and tokens (3, T)."""
    d, heads, vocabulary, length = (128, 4, 1000, 96) if device.type == "cuda" else (32, 2, 100, 24)
    config = load_profile("smoke", recipe).model
    width = {"embed_dim": d} if recipe == "crt2" else {}
    sizes = {"d_model": d, "n_heads": heads, "vocab_size": vocabulary, "dropout": 0.0}
    torch.manual_seed(0)
    model = CRT(config.replace(**sizes, **width))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(vocabulary, (3, length), device=device)
    return model.to(device, dtype).eval(), ids


def targets_of(ids):
    """What follows the tokens, the last not scored."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def learned(model, loss):
    """A loss and its gradients."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def loss_of(model, ids):
    return total_loss(model(ids, targets=targets_of(ids)), AUX)


def logits(device, dtype):
    """Logits of released, paper and crt2 with the plain formulas in float64."""
    for recipe in ("released", *BOTH):
        model, ids = small(recipe, device)
        with torch.no_grad():
            plain = reference_logits(model.state_dict(), model.config, ids)
            yield from zip(model.to(dtype)(ids).values(), plain.values(), strict=True)


def gradients(device):
    """Loss and gradients, recomputed or not, with the plain formulas."""
    for recipe in BOTH:
        model, ids = small(recipe, device)
        state = dict(model.named_parameters())
        plain = reference_loss(state, model.config, ids, targets_of(ids), AUX)[0]
        theirs = learned(model, plain)
        for model.gradient_checkpointing in (False, True):
            yield from zip(learned(model, loss_of(model, ids)), theirs, strict=True)


def in_chunks(device):
    """Loss and gradients, the logits in chunks, with those of whole logits, float32."""
    for recipe in BOTH:
        model, ids = small(recipe, device, torch.float32)
        whole = learned(model, loss_of(model, ids))
        sizes = {"WHOLE_ELEMENTS": 0, "CHUNK_ELEMENTS": 5000, "GPU_CHUNK_ELEMENTS": 5000}
        with mock.patch.multiple("crt_lib.loss", FUSED=False, **sizes):
            yield from zip(learned(model, loss_of(model, ids)), whole, strict=True)


def otherwise(device, recipe, half, compiled):
    """Loss and gradients in bfloat16 or by a compiled block with those in float32, eager."""
    model, ids = small(recipe, device, torch.float32)
    plain = learned(model, loss_of(model, ids))
    if compiled:  # on a CPU only the tracing is tried, which needs no compiler
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.block.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        loss = loss_of(model, ids)
    yield from zip(learned(model, loss), plain, strict=True)
    if compiled and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise RuntimeError(f"nothing of {recipe} was compiled")


def graphs(device):
    """Loss and gradients from CUDA graphs, the weights changed in between, with the plain ones."""
    for recipe in BOTH:
        model, ids = small(recipe, device, torch.float32)
        exits, targets = model.config.head_loops, targets_of(ids)
        losses = GraphedLosses(model, Precision("fp32", "as the check asks"))
        for _ in range(2):
            if device.type == "cuda":
                found = losses(ids, exits, targets)
            else:  # what would be captured
                found = dict(zip(exits, losses.plain(exits)(ids, targets), strict=True))
            plain = learned(model, loss_of(model, ids))
            yield from zip(learned(model, total_loss(found, AUX)), plain, strict=True)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)


def policies_of(model, ids):
    """Full depth, a fixed exit, and a threshold that about half of the tokens pass at the first.

    It lies between two scores: at one of them, rounding would decide whether that token exits.
    """
    first = model.config.exit_loops[0]
    with torch.no_grad():
        scores = model(ids, (first,))[first].softmax(-1).amax(-1).flatten().sort().values
    half = len(scores) // 2
    tau = float(scores[half - 1 : half + 1].mean())
    return [Policy(), Policy(fixed=first), Policy("confidence", tau, tau, 1.0)]


def text_of(made):
    """Tokens and exits."""
    return torch.tensor([[one.tokens, one.loops] for one in made])


def caches(device):
    """Tokens and exits decoded with caches and without, three prompts, exits, float64."""
    for recipe in BOTH:
        model, ids = small(recipe, device)
        prompts = [row[: 3 + 4 * i].tolist() for i, row in enumerate(ids)]
        for policy in policies_of(model, ids):
            how = {"policy": policy, "new_tokens": 12}
            made = generate(model, prompts, **how), generate(model, prompts, cache=False, **how)
            yield tuple(map(text_of, made))


def speculation(device):
    """Speculation by every exit and by the text with greedy decoding, float64."""
    kept = drafted = 0
    for recipe in BOTH:
        model, ids = small(recipe, device)
        prompt = [*ids[0, :9].tolist(), *ids[0, :9].tolist()]  # which the text drafts from
        plain = text_of(generate(model, [prompt], 12))
        for loop in (0, *model.config.exit_loops):
            with mock.patch.object(speculate, "SURE", 0.0):  # of random numbers no exit is sure
                made = Speculation(model, loop).generate(prompt, 12)
            kept, drafted = kept + made.accepted, drafted + made.drafted
            yield text_of([made]), plain
    if not 0 < kept < drafted:
        raise RuntimeError(f"{kept} of {drafted} drafts were kept: one outcome was not tried")


@torch.no_grad()
def exits(device, dtype):
    """Logits and loops of crt2 token by token with those of a window at once."""
    model, ids = small("crt2", device, dtype)
    for policy in policies_of(model, ids)[: None if dtype == torch.float64 else 1]:
        memory = Memory(model.config, len(ids), ids.shape[1], model.loop_encoding)
        steps = [run_with_exits(model, column, policy, memory) for column in ids.split(1, 1)]
        whole = run_with_exits(model, ids, policy)
        yield torch.cat([step.logits for step in steps], 1), whole.logits
        yield torch.cat([step.loops for step in steps], 1), whole.loops
        if not policy.asks:
            loop = policy.fixed or model.config.n_loops
            yield model(ids, (loop,))[loop], whole.logits


def audit(device):
    """The audit finds the leak of released and none in paper, crt2, crt2 in bfloat16."""
    few = {} if device.type == "cuda" else {"length": 8, "context": 16}
    for recipe in ("released", *BOTH, "crt2 in bfloat16"):
        dtype = torch.bfloat16 if "bfloat16" in recipe else torch.float32
        model, _ = small(recipe.split()[0], device, dtype)
        report = causality_report(model, model.config.vocab_size, seconds=2.0, **few)
        yield torch.tensor(float(report.leaks)), torch.tensor(float(recipe == "released"))


def training(device):
    """The loss of 40 updates falls, and not below the language's entropy: by how much it does."""
    profile = load_profile("smoke")
    precision = "bf16" if device.type == "cuda" else "fp32"
    settings = profile.train.replace(precision=precision, updates=40, eval_every=10)
    with tempfile.TemporaryDirectory() as folder:
        run = run_profile(profile.replace(train=settings), folder, progress=False)
    column = f"valid_loss_{profile.model.n_loops}"
    losses = [row[column] for row in run.metrics if column in row]
    floor = load_data(profile).corpus.entropy or 0.0
    yield torch.tensor(max(losses[-1] - losses[0], floor - losses[-1], 0.0)), torch.zeros(())


CHECKS = {  # name -> check, bound, options
    "logits": (logits, EXACT, {"dtype": torch.float64}),
    "logits in float32": (logits, SINGLE, {"dtype": torch.float32}),
    "gradients": (gradients, LOSS, {}),
    "loss in chunks": (in_chunks, SINGLE, {}),
    "bfloat16": (otherwise, HALF, {"recipe": "crt2", "half": True, "compiled": False}),
    "compiled": (otherwise, SINGLE, {"recipe": "paper", "half": False, "compiled": True}),
    "compiled, bfloat16": (otherwise, HALF, {"recipe": "crt2", "half": True, "compiled": True}),
    "CUDA graphs": (graphs, SINGLE, {}),
    "audit": (audit, 0.0, {}),
    "decoding with caches": (caches, 0.0, {}),
    "exits": (exits, EXACT, {"dtype": torch.float64}),
    "decoding, bfloat16": (exits, HALF, {"dtype": torch.bfloat16}),
    "speculation": (speculation, 0.0, {}),
    "training": (training, 0.0, {}),
}
