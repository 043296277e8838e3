"""How the paper's claims of parameters, memory and speed are judged: a small function a rule."""

from typing import Any

from crt_lib.audit.accounting import parameters_by_part
from crt_lib.config import GPT2Config, ModelConfig
from crt_lib.study.ledger import FAILS, HOLDS, NEAR, UNDERIVED, UNTESTED, Judged, Results

DECODE_PAPER = (
    "crt train --profile quick --recipe paper; crt bench decode results/quick/paper --tokens 192 "
    "--out results/bench/decode_paper.csv"
)
PARAMETERS = (
    "python -c 'from crt_lib import ModelConfig, audit; "
    'print(audit.parameter_report(ModelConfig(head_sharing="separate")))\''
)


def speedups(results: Results) -> Judged:
    """Measured decoding speeds of fixed exits against the counted ones."""
    rows = results.bench("decode_paper.csv")
    if rows is None:
        return Judged(UNTESTED, "crt bench decode has not been run on the paper's block")
    speeds = {row["way"]: row["speedup"] for row in rows if row["batch"] == 1}
    claimed = {"exit 2": 4.0, "exit 4": 2.0, "exit 6": 8 / 6}
    held = all(speeds[way] >= ratio * (1 - NEAR) for way, ratio in claimed.items())
    said = ", ".join(f"{way} {speeds[way]:.2f}x" for way in claimed)
    return Judged(
        HOLDS if held else FAILS,
        "8/2, 8/4 and 8/6 count loops; embedding and head are left out",
        honest=said,
        profile="quick",
        seeds=1,
        command=DECODE_PAPER,
    )


def thresholds(results: Results) -> Judged:
    """The paper's thresholds: 1.33x without loss? On the paper's block, and on crt2."""
    found = results.bench("decode_paper.csv")
    trained = results.table("crt2/decode.csv")
    if found is None or trained is None:
        return Judged(UNTESTED, "crt bench decode has not been run on the paper's block and crt2")
    said, held = [], []
    for rows in (found, trained[1]):
        ways = {row["way"]: row for row in rows if row["batch"] == 1}
        row, full = ways["the paper's thresholds"], ways["full depth"]
        worse = row["token_ppl"] / full["token_ppl"] - 1
        held.append(row["speedup"] >= 1.33 * (1 - NEAR) and worse <= 0.005)
        said.append(
            f"{row['speedup']:.2f}x at {worse:+.1%} PPL, {row['mean_loops']:.1f} of "
            f"{full['mean_loops']:.0f} loops"
        )
    return Judged(
        HOLDS if all(held) else FAILS,
        "confidence is read from a vocabulary head at every exit, which costs more than the loops "
        "that leaving saves; the paper's block was benched after the short training of quick, "
        "where no token may reach the threshold",
        honest=f"the paper's block {said[0]}; crt2 {said[1]}",
        profile=f"quick; {trained[0]}",
        seeds=1,
        command=f"{DECODE_PAPER}; crt bench decode results/small/crt2 "
        "--out results/small/crt2/decode.csv",
    )


def parameters(results: Results) -> Judged:
    """The parameters of Table 1."""
    released, shared = (_total(sharing) for sharing in ("separate", "shared_aux"))
    return Judged(
        HOLDS if abs(released / 92e6 - 1) <= 0.01 else FAILS,
        "the released heads are separate; with one projection for the three early heads it is 92M",
        released=f"{released:,}",
        honest=f"{shared:,} with shared early heads",
        command=PARAMETERS,
    )


def fewer_than_gpt2(results: Results) -> Judged:
    """The parameters against those of GPT-2 Small."""
    gpt2 = sum(
        parameters_by_part(
            GPT2Config(vocab_size=50257, d_model=768, n_heads=12, n_layers=12, max_seq_len=1024)
        ).values()
    )
    released, shared = (1 - _total(s) / gpt2 for s in ("separate", "shared_aux"))
    return Judged(
        HOLDS if abs(released - 0.26) <= 0.01 else FAILS,
        "as C01",
        released=f"{-released:+.0%}",
        honest=f"{-shared:+.0%} with shared early heads",
        command=PARAMETERS,
    )


def embedding(results: Results) -> Judged:
    """What an embedding of half the width saves."""
    half = _total("tied")
    full = _total("tied", embed_dim=512)
    return Judged(
        HOLDS if abs(1 - half / full - 0.329) <= 0.01 else UNDERIVED,
        f"tied heads, embeddings d/2 and d wide: {half / 1e6:.1f}M and {full / 1e6:.1f}M "
        "parameters; what has 61.1M the paper does not say, nor of what the 98.3 % is a share",
        honest=f"{1 - half / full:.1%} fewer",
        command=PARAMETERS,
    )


def memory(results: Results) -> Judged:
    """What a training step needs."""
    rows = results.bench("train.csv")
    if rows is None:
        return Judged(UNTESTED, "crt bench train has not been run")
    peaks = {
        side: max(
            row["peak_memory_bytes"] / 1e9
            for row in rows
            if row["rows"] == 2 and row["side"] == side
        )
        for side in ("released", "ours")
    }
    return Judged(
        HOLDS if max(peaks.values()) <= 6 else FAILS,
        "peak memory of the process that trains Table 1's model with its 92M parameters, 2 x 384 "
        "tokens, checkpointed, on a CPU; with a step as released and with ours",
        released=f"{peaks['released']:.2f} GB, on a CPU",
        honest=f"{peaks['ours']:.2f} GB, on a CPU",
        profile="paper",
        command="crt bench train --out results/bench/train.csv",
    )


def _total(sharing: str, **changes: Any) -> int:
    config = ModelConfig().replace(head_sharing=sharing, **changes)
    return sum(parameters_by_part(config).values())
