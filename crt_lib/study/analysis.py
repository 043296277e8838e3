"""The per-loop analysis of a run, kept in its folder: traces, a depth sweep, calibrated policies.

What is kept holds numbers only, and a passage of this project's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crt_lib.audit.compare import exit_table
from crt_lib.bench.decode import bench_decode
from crt_lib.exits.decode import Sampling, generate
from crt_lib.exits.perloop import above_full, depth_sweep, loss_above_full
from crt_lib.exits.policy import Policy, evaluate_with_exits
from crt_lib.exits.trace import (
    Trace,
    apply_policy,
    calibrate,
    chance,
    make_passage,
    make_trace,
    oracle,
)
from crt_lib.files import read_rows, sha256, write_rows
from crt_lib.model import CRT
from crt_lib.runs.trained import as_crt, find_checkpoint, gate_run, load_trained, load_trained_model
from crt_lib.text.tokenizer import TokenizedCorpus, Tokenizer

THRESHOLDS = ("tau0", "tau_min", "decay")
ALLOWED = 0.005  # the share of the perplexity that a calibrated policy may lose
TRACED_TOKENS = 50_000  # of valid and of test
DEPTH_TOKENS = 10_000  # of valid, for the depth sweep
DECODED_TOKENS = 64  # of one text, to measure the ways of decoding
PROMPT_TOKENS = 32  # that they continue
PAPER_TABLE_2 = {  # exit -> (validation loss, PPL, speedup) as the paper has them, its Table 2
    2: (0.0892, 1.093, 4.0),
    4: (0.0812, 1.084, 2.0),
    6: (0.0778, 1.081, 1.33),
    8: (0.0996, 1.105, 1.0),
}
PASSAGES = {  # written for this project, in the manner of the corpus
    "wikitext-2": (
        " The lighthouse was built in 1862 on the north coast of the island , and it was the first "
        "in the country to use an electric lamp . In the winter of 1881 a storm destroyed the "
        "upper part of the tower . Two of the three men who lived there died , and the third was "
        "found a week later by the crew of a fishing boat . The tower was rebuilt in the following "
        "year , and it is now a museum that is open to the public in the summer ."
    ),
    "docstrings": (
        "Return the number of rows in the array. If axis is None, the values are computed over the "
        "whole array and the result is a float. Otherwise the result is an array with the same "
        "shape as the input, except that the given axis is removed. The default is None."
    ),
}


@dataclass(frozen=True)
class Analysis:
    """A trained model and what was measured of its loops."""

    model: CRT
    tokenizer: Tokenizer
    valid: Trace
    test: Trace
    exits: list[dict[str, Any]]  # rows of `exit_table`
    depth: list[dict[str, Any]]  # rows of `depth_sweep` on valid
    policies: list[dict[str, Any]]  # rows of `judge_policies`
    decode: list[dict[str, Any]]  # rows of `bench_decode`
    passage: Trace


@dataclass
class Judged:
    """A trained model, its traces of valid and test, and policies judged on them."""

    folder: Path
    model: CRT
    tokenizer: Tokenizer
    trained: dict[str, Any]
    traces: dict[str, Trace]
    policies: list[dict[str, Any]]  # rows of `judge_policies`
    data: TokenizedCorpus | None  # where something had to be made
    tokens: int

    def bench(self, batch_size: int, texts: int, **how: Any) -> list[dict[str, Any]]:
        """Rows of `bench_decode` on prompts of the run's passage, at least `texts` of them."""
        ids = passage_ids(self.model, self.tokenizer, self.trained)
        longest = self.model.config.max_seq_len - how["new_tokens"]
        length = max(1, min(PROMPT_TOKENS, longest, len(ids) // 2))
        starts = [i % (len(ids) - length) for i in range(-(-texts // batch_size) * batch_size)]
        rows = bench_decode(
            self.model,
            [ids[start:][:length] for start in starts],
            policies_of(self.policies),
            {row["policy"]: row["taken"] for row in self.policies},
            self.traces["test"],
            batch_size=batch_size,
            **how,
        )
        checkpoint = checkpoint_digest(self.folder)
        return [{**row, "checkpoint": checkpoint} for row in rows]


def judge_run(folder: str | Path, *, fresh: bool = False, tokens: int | None = None) -> Judged:
    """The gate, traces and policies of the run in `folder`: what is kept and of this checkpoint,
    the rest made and kept there. Raises InputError as `analyse`.
    """
    folder = Path(folder)
    checkpoint = checkpoint_digest(folder)
    files = {name: folder / "traces" / f"{name}.safetensors" for name in ("valid", "test")}
    table = folder / "policies.csv"
    traces = {} if fresh else _kept(files, checkpoint, tokens)
    tokens = tokens or (traces["valid"].about["max_tokens"] if traces else TRACED_TOKENS)
    if traces and table.is_file():
        loaded, tokenizer, trained = load_trained_model(folder)
        model, kept = as_crt(loaded, folder), read_rows(table)
        return Judged(folder, model, tokenizer, trained, traces, kept, None, tokens)
    loaded, data, trained = load_trained(folder)
    model = as_crt(loaded, folder)
    if model.gate is None:
        model.gate = gate_run(folder, tokens).gate
    model.eval()
    for name in () if traces else files:
        made = make_trace(model, data, name, trained["train"]["seq_len"], max_tokens=tokens)
        made.about.update(checkpoint=checkpoint, max_tokens=tokens)
        made.save(files[name])
        traces[name] = made
    policies = judge_policies(model, data, **traces)
    write_rows(table, policies)
    return Judged(folder, model, data.tokenizer, trained, traces, policies, data, tokens)


def analyse(folder: str | Path, *, fresh: bool = False, tokens: int | None = None) -> Analysis:
    """The analysis of the run in `folder`: what is kept and of this checkpoint, the rest made.

    Makes an exit gate, `traces/*.safetensors`, depth.csv and policies.csv there, from the first
    `tokens` of train, valid and test (None: as many as kept traces hold, else 50,000), and
    decode.csv, a short `crt bench decode`; exits.csv, where the run has not left it. Raises
    InputError for a folder without a checkpoint, and, only when something must be made, for a
    corpus that cannot be had.
    """
    judged = judge_run(folder, fresh=fresh, tokens=tokens)
    folder, model, trained = judged.folder, judged.model, judged.trained
    seq_len, checkpoint = trained["train"]["seq_len"], checkpoint_digest(folder)
    data = judged.data
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in ("exits", "depth", "decode"):
        path = folder / f"{name}.csv"
        # exits.csv is of the run itself; a long measurement of speed is not lost with a trace
        if path.is_file() and not fresh and (data is None or name != "depth"):
            kept = read_rows(path)
            if name != "decode" or kept[0].get("checkpoint") == checkpoint:
                rows[name] = kept
                continue
        if name == "decode":
            new_tokens = min(DECODED_TOKENS, model.config.max_seq_len // 2)
            rows[name] = judged.bench(1, 2, new_tokens=new_tokens, rounds=1, compiled=False)
        else:
            data = data or load_trained(folder)[1]
            rows[name] = _TABLES[name](model, data, seq_len, judged.tokens)
        write_rows(path, rows[name])
    return Analysis(
        model=model,
        tokenizer=judged.tokenizer,
        valid=judged.traces["valid"],
        test=judged.traces["test"],
        exits=rows["exits"],
        depth=rows["depth"],
        policies=judged.policies,
        decode=rows["decode"],
        passage=passage_of(model, judged.tokenizer, trained),
    )


def _exits(model: CRT, data: TokenizedCorpus, seq_len: int, _: int) -> list[dict[str, Any]]:
    return exit_table(model, data, seq_len)


def _depth(model: CRT, data: TokenizedCorpus, seq_len: int, tokens: int) -> list[dict[str, Any]]:
    sample = data.valid.ids[: min(tokens, DEPTH_TOKENS)]
    return depth_sweep(model, sample, data.tokenizer.eot_id, seq_len=seq_len)


_TABLES = {"exits": _exits, "depth": _depth}


def checkpoint_digest(path: str | Path) -> str:
    """The SHA-256 of a run's best checkpoint, after a letter, so that no table takes it for a
    number.
    """
    return "s" + sha256(find_checkpoint(path).read_bytes())


def _kept(files: dict[str, Path], checkpoint: str, tokens: int | None) -> dict[str, Trace]:
    """The traces in `files` if all are there, of this checkpoint and as long, else none.

    None for `tokens`: of any length, all the same.
    """
    if not all(path.is_file() for path in files.values()):
        return {}
    traces = {name: Trace.load(path) for name, path in files.items()}
    tokens = tokens or traces["valid"].about.get("max_tokens")
    wanted = {"checkpoint": checkpoint, "max_tokens": tokens}
    return traces if all(wanted.items() <= t.about.items() for t in traces.values()) else {}


def passage_of(model: CRT, tokenizer: Tokenizer, trained: dict[str, Any]) -> Trace:
    """A text of this project's, traced; for a corpus without one, a text that the model makes.

    No more of it than the model has positions for.
    """
    ids = passage_ids(model, tokenizer, trained)
    return make_passage(model, tokenizer, tokenizer.decode(ids))


def passage_ids(model: CRT, tokenizer: Tokenizer, trained: dict[str, Any]) -> list[int]:
    """The tokens of that text."""
    text = PASSAGES.get(trained["data"]["corpus"])
    length = min(model.config.max_seq_len, 128)
    if text is not None:
        return tokenizer.encode(text)[:length].tolist()
    drawn = Sampling(temperature=0.8)
    (made,) = generate(model, [[tokenizer.eot_id]], length - 1, sampling=drawn)
    return made.tokens


def named_policies(model: CRT, data: TokenizedCorpus, valid: Trace) -> dict[str, Policy]:
    """Full depth, each fixed exit, the paper's thresholds, each criterion calibrated on `valid`."""
    policies = {"full depth": Policy()}
    policies |= {f"exit {loop}": Policy(fixed=loop) for loop in valid.loops[:-1]}
    policies["the paper's thresholds"] = Policy("confidence")
    return policies | {
        name: calibrate_taken(model, data, valid, name, ALLOWED) for name in valid.scores
    }


def calibrate_taken(
    model: CRT, data: TokenizedCorpus, trace: Trace, criterion: str, allowed: float
) -> Policy:
    """As `crt_lib.exits.trace.calibrate`, but the promise holds with exits taken as in decoding.

    Then the context of a token has left too, which the trace does not show; its budget is lowered
    by what that loses besides, until the promise holds. Full depth if it does not in a few rounds.
    """
    limit = apply_policy(trace, Policy()).loss + math.log1p(allowed)
    budget = math.log1p(allowed)
    for _ in range(6):
        policy = calibrate(trace, criterion, math.expm1(budget))
        if policy.criterion is None:
            return policy
        over = taken_loss(model, data, trace, policy) - limit
        if over <= 0:
            return policy
        budget -= over
    return Policy()


def taken_loss(model: CRT, data: TokenizedCorpus, trace: Trace, policy: Policy) -> float:
    """Nats a token on the tokens of `trace`, with exits taken as in decoding."""
    return float(taken_losses(model, data, trace, policy).mean())


def taken_losses(model: CRT, data: TokenizedCorpus, trace: Trace, policy: Policy) -> np.ndarray:
    """As `taken_loss`, of each token (N,)."""
    if policy.criterion is None:  # all tokens leave at one exit: as the trace has it
        exit_of = apply_policy(trace, policy).exit[:, None]
        return np.take_along_axis(trace.loss, exit_of, 1)[:, 0].astype(np.float64)
    ids = data.split(trace.about["split"]).ids[: len(trace.loss)]
    eot = data.tokenizer.eot_id
    return evaluate_with_exits(model, ids, eot, policy, seq_len=trace.seq_len)[0]


def judge_policies(
    model: CRT, data: TokenizedCorpus, valid: Trace, test: Trace
) -> list[dict[str, Any]]:
    """A row a policy of `named_policies`, `chance` and the oracle: its loss and cost on `test`.

    `above`, `low` and `high`: nats a token above full depth as the trace has it, with the interval
    over documents. `taken`: nats a token with exits taken as in decoding, on the same tokens;
    `taken_above`, `taken_low`, `taken_high`: those above full depth.
    """
    rows = []
    for name, policy in named_policies(model, data, valid).items():
        row = _row(name, test, apply_policy(test, policy))
        taken = taken_losses(model, data, test, policy)
        above = above_full(test, taken)
        row["taken"] = float(taken.mean())
        row |= {"taken_above": above.mean, "taken_low": above.low, "taken_high": above.high}
        row |= {"criterion": policy.criterion, "last": policy.fixed}
        if policy.criterion:
            row |= {name: getattr(policy, name) for name in THRESHOLDS}
        rows.append(row)
    rows.append(_row("chance", test, chance(valid, test, ALLOWED)))
    return [*rows, _row("oracle", test, oracle(test))]


def policies_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Policy]:
    """The policies of rows of `judge_policies` by name; `chance` and the oracle are none."""
    policies = {}
    for row in rows:
        if row["taken"] is not None:
            given = {name: row[name] for name in THRESHOLDS if row[name] is not None}
            policies[row["policy"]] = Policy(row["criterion"], **given, fixed=row["last"])
    return policies


def _row(name: str, trace: Trace, outcome: Any) -> dict[str, Any]:
    above = loss_above_full(trace, outcome)
    shares = " ".join(f"{k}:{s:.4f}" for k, s in zip(trace.loops, outcome.shares, strict=True))
    return {
        "policy": name,
        "criterion": None,
        **dict.fromkeys(THRESHOLDS),
        "last": None,
        "loss": outcome.loss,
        "above": above.mean,
        "low": above.low,
        "high": above.high,
        "mean_loops": outcome.mean_loops,
        "heads": outcome.heads,
        "multiply_adds": outcome.multiply_adds,
        "shares": shares,
        **dict.fromkeys(("taken", "taken_above", "taken_low", "taken_high")),
    }
