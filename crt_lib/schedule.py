"""What an update uses: learning rate, batches, exits, optimizers, random seed, precision."""

import math

import numpy as np
import torch

from crt_lib.batches import PackedWindows, PaddedLines
from crt_lib.config import TrainConfig
from crt_lib.files import InputError
from crt_lib.tokenizer import TokenizedCorpus


def make_batches(config: TrainConfig, data: TokenizedCorpus) -> PackedWindows | PaddedLines:
    """The training batches of `config.batching`; raises InputError when `data` is too small."""
    eot = data.tokenizer.eot_id
    if config.batching == "padded":
        return PaddedLines(data.train.lines, config.seq_len, config.batch_size, config.seed, eot)
    return PackedWindows(data.train.ids, config.seq_len, config.batch_size, config.seed, eot)


def updates_planned(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer updates of a run: `config.updates`, or what `config.epochs` come to."""
    if config.updates is not None:
        return config.updates
    return max(1, math.floor(config.epochs * steps_per_epoch / config.grad_accum))


def learning_rate(update: int, updates: int, config: TrainConfig) -> float:
    """OneCycle with cosine annealing at `update` in 0..updates-1, as torch's OneCycleLR has it.

    From max_lr / 25 up to max_lr over the warm-up, then down to max_lr / 250,000. A function, since
    torch's scheduler divides by zero when the warm-up ends on update 0.
    """
    peak = config.warmup * updates - 1
    low, high, end = config.max_lr / 25, config.max_lr, config.max_lr / 250_000
    if update < peak:
        start, stop, share = low, high, update / peak
    else:
        peak = max(peak, 0.0)
        start, stop, share = high, end, (update - peak) / (updates - 1 - peak or 1.0)
    return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2


def resolve_precision(
    precision: str, device: torch.device, d_model: int, optimizer: str = "adamw"
) -> str:
    """What `auto` stands for: half precision where it is faster.

    On a GPU bf16, or fp16 without bf16 units (fp32 for muon: fp16 scales the loss for one
    optimizer, and muon is two; asking for both is an InputError). On a CPU bf16 if the chip
    multiplies bf16 matrices and the model is at least 192 wide (narrower, the casts cost more than
    they save), else fp32.
    """
    if precision == "fp16" and optimizer == "muon":
        raise InputError("fp16 scales the loss, for one optimizer; muon is two: use fp32 or bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp32" if optimizer == "muon" else "fp16"
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        chip = torch.cpu.get_capabilities()
        if d_model >= 192 and (chip.get("avx512_bf16") or chip.get("amx_bf16")):
            return "bf16"
    return "fp32"


def exits_of_update(
    head_loops: tuple[int, ...], update: int, config: TrainConfig
) -> tuple[int, ...]:
    """The loops whose heads `update` trains, the deepest being the loops it runs.

    All of `head_loops`, unless `loop_sampling` draws how deep the update goes (then up to the next
    loop with a head), or `exits_trained` draws one exit from those before the deepest.
    """
    rng = np.random.default_rng([config.seed, update, 1])
    exits = head_loops
    if config.loop_sampling != "none":
        deepest = head_loops[-1]
        if config.loop_sampling == "uniform":
            loops = int(rng.integers(1, deepest + 1))
        else:
            sigma = 0.5  # Huginn's: 1 + Poisson(e^tau), tau normal, with the mean `deepest`
            tau = rng.normal(math.log(max(deepest - 1, 1e-9)) - sigma**2 / 2, sigma)
            loops = min(1 + int(rng.poisson(math.exp(tau))), deepest)
        exits = tuple(k for k in head_loops if k < loops)
        exits = (*exits, head_loops[len(exits)])
    if config.exits_trained == "one" and len(exits) > 2:
        exits = (exits[rng.integers(len(exits) - 1)], exits[-1])
    return exits


def make_optimizers(model: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the model and AdamW for the rest.

    Muon makes a matrix's update orthogonal; embeddings, vocabulary heads, gains, biases and
    convolution kernels are not such matrices. Raises InputError where torch has no Muon.
    """
    inner: list[torch.nn.Parameter] = []
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"torch {torch.__version__} has no Muon; use optimizer adamw")
        embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        vocabulary = model.config.vocab_size
        inner = [
            p
            for name, p in model.named_parameters()
            if p.ndim == 2 and name.endswith("weight")
            if p not in embeddings and p.shape[0] != vocabulary
        ]
    rest = [p for p in model.parameters() if p not in set(inner)]
    options = {"lr": config.max_lr, "weight_decay": config.weight_decay}
    optimizers = [torch.optim.AdamW(rest, betas=config.betas, fused=True, **options)]
    if inner:
        muon = torch.optim.Muon(inner, adjust_lr_fn="match_rms_adamw", **options)
        optimizers.append(muon)
    return optimizers


def random_seed(seed: int, update: int, micro: int) -> int:
    """A seed below 2**63 for each (seed, update, micro-batch)."""
    return int(np.random.SeedSequence([seed, update, micro]).generate_state(1, np.uint64)[0] >> 1)
