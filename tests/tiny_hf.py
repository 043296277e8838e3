"""Models in transformers, tiny ones and the committed one: what tests of `hf` and `audit` share."""

from functools import partial
from pathlib import Path

import torch
import transformers
from tiny_models import ALL_OPTIONS, COMBINATIONS, OPTIONS, TINY, exact_model, random_ids

from crt_lib import load
from crt_lib.hf.model import CRTForCausalLM

CASES = {"paper": {}, **OPTIONS, "all": ALL_OPTIONS, "batch norm": {"norm": "batch"}}
CASES |= {name: {**changes, "causal": True} for name, changes in list(COMBINATIONS.items())[:10]}
FEW = {name: CASES[name] for name in ("paper", "full embedding, tied", "prelude", "all")}
END = {"pad_token_id": 0, "max_new_tokens": 9}
DEMO = Path(__file__).parents[1] / "results" / "demo"
LEFT = torch.tensor([[1] * 10, [0] * 4 + [1] * 6, [0] + [1] * 9])


def wrapped(**changes):
    """A model in float64, and the same in transformers."""
    model = exact_model(**changes)
    return model, CRTForCausalLM.from_crt(model)


def demo():
    """As `wrapped`, of the model that is handed out."""
    model = load(DEMO)[0].double()
    return model, CRTForCausalLM.from_crt(model)


MODELS = {name: partial(wrapped, **changes) for name, changes in FEW.items()} | {"demo": demo}
TWO = {name: MODELS[name] for name in ("paper", "demo")}


def given_ids(rows=3, length=10):
    return random_ids(rows, length).clamp(min=1)  # 0 is padding


def gpt2():
    """transformers' GPT-2 with the vocabulary of the tiny models."""
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "bos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=TINY.vocab_size, eos_token_id=0, **shape)
    return transformers.GPT2LMHeadModel(config).eval()
