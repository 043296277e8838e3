"""The same model trained with and without the leak, and the variants of Table 3 so."""

from pathlib import Path
from typing import Any

from crt_lib.evaluate import evaluate, evaluate_deployable
from crt_lib.profiles import Profile
from crt_lib.tokenizer import TokenizedCorpus
from crt_lib.train import TrainResult, train

PAPER_TABLE_3 = {  # TRM cycle -> validation loss, 3 loops; `conv` is the paper's "Pure Conv TRM"
    "linear": 3.4080,
    "conv": 1.8815,
    "conv_linear": 1.6986,
    "depthwise": 2.1312,
}


def train_both(
    profile: Profile, data: TokenizedCorpus, name: str, out: Path, *, fresh: bool = False
) -> dict[str, TrainResult]:
    """`profile` trained twice, alike but for the convolutions' padding: "symmetric" and "causal".

    In `out`/`name`; a training that is there is not made again unless `fresh`.
    """
    made = {}
    for kind, causal in (("symmetric", False), ("causal", True)):
        vocabulary = data.tokenizer.vocab_size
        config = profile.model.replace(vocab_size=vocabulary, causal=causal)
        folder = out / name / kind
        made[kind] = train(config, profile.train, data, folder, resume=not fresh, progress=False)
    return made


def table_3(
    profile: Profile, data: TokenizedCorpus, out: Path, *, fresh: bool = False
) -> list[dict[str, Any]]:
    """A row a variant of Table 3: the paper's loss, and ours with and without the leak.

    `symmetric` and `causal`: nats a token on all of valid, last exit. `deployable`: of the
    symmetric model when nothing after a token is in its input; for the causal one that is `causal`.
    """
    rows = []
    eot, length = data.tokenizer.eot_id, profile.train.seq_len
    for variant, paper in PAPER_TABLE_3.items():
        own = profile.replace(model=profile.model.replace(trm=variant))
        row: dict[str, Any] = {"variant": variant, "paper": paper}
        for kind, made in train_both(own, data, f"table_3/{variant}", out, fresh=fresh).items():
            row[kind] = evaluate(made.model, data.valid, eot, seq_len=length).loss[
                own.model.n_loops
            ]
            if kind == "symmetric":
                alone = evaluate_deployable(made.model, data.valid.ids, eot)
                row["deployable"] = alone.loss[own.model.n_loops]
        rows.append({**row, "seed": profile.train.seed, "updates": profile.train.updates})
    return rows
