"""The paper's Tables 1 to 4, each value beside what was measured in its place."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from crt_lib.audit.accounting import parameter_report
from crt_lib.config import ModelConfig, config_from_dict
from crt_lib.files import read_rows
from crt_lib.runs.profiles import load_profile
from crt_lib.study.ablations import searched_table_3
from crt_lib.study.analysis import PAPER_TABLE_2
from crt_lib.study.sota import PAPER_TABLE_4, exits_of, finished_run, published_rows

PAPER_TABLE_1 = {  # component -> value as printed, field of the configuration
    "recursive loops": ("8", "n_loops"),
    "hidden dimension": ("512", "d_model"),
    "attention heads": ("8", "n_heads"),
    "TRM cycles per loop": ("8", "n_cycles"),
    "kernel size": ("3", "kernel_size"),
    "normalization": ("LayerNorm", "norm"),
    "embedding cycles": ("3", "n_embed_cycles"),
    "intermediate heads": ("2, 4, 6", "exit_loops"),
    "max sequence length": ("1024", "max_seq_len"),
}
RUNS = {  # column -> run of small, protocol by which it is scored
    "released, as scored": ("released", "released"),
    "released, no padding": ("released", "honest"),
    "causal": ("paper", "honest"),
    "crt2": ("crt2", "honest"),
}


def table_1(small: Path) -> pd.DataFrame:
    """The configuration: as printed, of the released code, made causal, and of crt2 at small."""
    configs = {
        "released code": load_profile("paper", "released").model,
        "causal": load_profile("paper", "paper").model,
        "crt2, small": config_from_dict(finished_run(small / "crt2").manifest["model"]),
    }
    printed = {component: value for component, (value, _) in PAPER_TABLE_1.items()}
    columns = {"paper": printed | {"total parameters": "~92M"}}
    for name, config in configs.items():
        assert isinstance(config, ModelConfig)
        own = {component: getattr(config, of) for component, (_, of) in PAPER_TABLE_1.items()}
        columns[name] = {component: str(value).strip("()") for component, value in own.items()}
        total = parameter_report(config).total
        columns[name]["total parameters"] = f"{total / 1e6:.1f}M"
    return pd.DataFrame(columns)


def losses(small: Path, split: str = "valid") -> pd.DataFrame:
    """Nats a token of `split`: a row for each of the paper's four exits, a column of RUNS each.

    The runs have four loops, so that their exits 1 to 4 stand for the paper's 2, 4, 6 and 8.
    """
    columns = {}
    for name, (folder, protocol) in RUNS.items():
        rows = exits_of(finished_run(small / folder).results, protocol, split=split)
        columns[name] = [row["loss"] for row in rows]
    return pd.DataFrame(columns, index=pd.Index(PAPER_TABLE_2, name="exit"))


def speeds(small: Path) -> pd.DataFrame:
    """Measured speed of decoding by exit, one text at a time, and PPL, as shares of full depth's.

    A row for each of the paper's four exits of the causal block (of eight loops, at quick) and of
    crt2 (of four, at small), and the paper's own.
    """
    files = {
        "causal, 8 loops": (small.parent / "bench/decode_paper.csv", (2, 4, 6)),
        "crt2": (small / "crt2/decode.csv", (1, 2, 3)),
    }
    _, ppl, speed = zip(*PAPER_TABLE_2.values(), strict=True)
    columns: dict[tuple[str, str], Any] = {("paper", "speed"): speed}
    columns["paper", "PPL"] = [value / ppl[-1] for value in ppl]
    for name, (path, loops) in files.items():
        rows = {row["way"]: row for row in read_rows(path) if row["batch"] == 1}
        own = [rows[way] for way in (*(f"exit {loop}" for loop in loops), "full depth")]
        columns[name, "speed"] = [row["speedup"] for row in own]
        columns[name, "PPL"] = [row["token_ppl"] / own[-1]["token_ppl"] for row in own]
    return pd.DataFrame(columns, index=pd.Index(PAPER_TABLE_2, name="exit"), dtype=float)


def table_2(small: Path) -> pd.DataFrame:
    """Perplexity on valid and speed by exit: the paper's, and the runs' of `losses`, `speeds`."""
    fast = speeds(small)
    table = losses(small).map(math.exp)
    table.insert(0, "paper", [ppl for _, ppl, _ in PAPER_TABLE_2.values()])
    for name in fast.columns.unique(0):
        table[f"speed, {name}"] = fast[name, "speed"]
    return table


def table_3(small: Path) -> pd.DataFrame:
    """Nats a token on valid of each TRM variant, 3 loops: means over seeds, rates tuned.

    `released, in use`: the symmetric model with nothing after the predicted token to see.
    """
    rows = pd.DataFrame(searched_table_3(read_rows(small / "search.csv"))).set_index("variant")
    names = {"symmetric": "released", "deployable": "released, in use"}
    return rows.rename(columns=names).drop(columns="rates")


def table_4(small: Path) -> pd.DataFrame:
    """Perplexity a token on test beside the paper's; of other models what was published.

    CRT is that of `small` on WikiText-2, the others are on WikiText-103, a word's where it says so.
    """
    published = published_rows(small.parent / "published.csv", "wikitext-103")
    ours = losses(small, "test").map(math.exp)
    rows = {}
    for model, parameters, printed in PAPER_TABLE_4:
        row = {"parameters": parameters, "paper": printed}
        loop = 6 if "Loop 6" in model else 8
        if model.startswith("CRT"):
            row |= {name: f"{value:,.4g}" for name, value in ours.loc[loop].items()}
        else:
            known = [f"{r['ppl']:g} per {r['unit']}" for r in published if r["model"] == model]
            row["published"] = ", ".join(known)
        rows[model] = row
    return pd.DataFrame(rows).T.fillna("")
