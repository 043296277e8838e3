"""`crt bench assisted`: drafts leave greedy text as it is, and save passes of the model."""

import copy

import pytest
import torch

from crt_lib import InputError
from crt_lib.bench import assisted
from crt_lib.bench.assisted import ALONE, ASSISTED, LOOKED_UP, OWN, as_transformers, bench_assisted
from crt_lib.bench.gpt2 import COMPILED, _step
from crt_lib.config import GPT2Config, make_model
from crt_lib.exits.decode import generate

PROMPTS = [[3, 1, 4, 1], [1, 5, 9, 2]]


def gpt2(n_layers=2, **changes):
    torch.manual_seed(n_layers)
    shape = {"vocab_size": 50, "d_model": 16, "n_heads": 2, "max_seq_len": 64}
    return make_model(GPT2Config(n_layers=n_layers, **shape, **changes)).eval().double()


def test_a_gpt2_writes_the_same_in_every_way():
    model = gpt2()
    rows = bench_assisted(model, PROMPTS, 20, model, compiled=False)
    found = {row["way"]: row for row in rows}
    assert list(found) == [ALONE, LOOKED_UP, ASSISTED, OWN]
    assert all(row["same"] == 1 and row["tokens_per_second"] > 0 for row in rows)
    assert found[ALONE]["passes"] == found[ALONE]["speedup"] == 1
    assert found[ASSISTED]["passes"] <= 0.5  # it drafts what it would say itself
    assert found[LOOKED_UP]["passes"] < 1  # a random model repeats itself
    assert found[OWN]["passes"] is None


def test_the_exits_of_a_crt_draft(scored):
    model, *_ = scored
    found = {row["way"]: row for row in bench_assisted(model, PROMPTS, 20)}
    exits = [f"exit {loop} drafts" for loop in model.config.exit_loops]
    assert list(found) == [ALONE, LOOKED_UP, *exits, OWN, f"{OWN}, {LOOKED_UP}"]
    assert all(row["same"] == 1 for row in found.values())
    assert all(found[name]["passes"] < 1 for name in exits)


def test_an_early_exit_of_a_gpt2_cannot_draft_as_results_readme_says():
    hf, ids = as_transformers(gpt2()), torch.tensor(PROMPTS[:1])
    how = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert hf.generate(ids, **how).shape == (1, 10)
    with pytest.raises(IndexError):
        hf.generate(ids, assistant_early_exit=1, **how)


def test_nothing_is_compiled_while_it_is_timed(monkeypatch):
    """A step is compiled for a length of its cache: what is timed has the one of the warm-up."""
    lengths = []

    def step(transformer, ids, cache, positions):
        lengths.append(cache.layers[0].max_cache_len)
        return _step(transformer, ids, cache, positions)

    monkeypatch.setattr(assisted, "compiled_step", lambda: step)
    rows = bench_assisted(gpt2(), PROMPTS, 6)
    assert OWN + COMPILED in {row["way"] for row in rows}
    assert len(set(lengths)) == 1 and len(lengths) == 4 * 5  # two texts to warm up, two timed


def test_it_is_the_same_model(scored):
    model, *_ = scored
    ours, theirs = gpt2(), as_transformers(gpt2())
    ids = torch.tensor(PROMPTS)
    with torch.inference_mode():
        (logits,) = ours(ids).values()
        assert torch.equal(theirs(ids).logits, logits)
        target = as_transformers(copy.deepcopy(model))
        made = target.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert made[0, 4:].tolist() == generate(model, PROMPTS[:1], 8)[0].tokens


@pytest.mark.parametrize("prompts, new", [(PROMPTS[:1], 8), (PROMPTS, 1)])
def test_too_little_is_not_timed(prompts, new):
    with pytest.raises(InputError, match="at least 2 are timed"):
        bench_assisted(gpt2(), prompts, new)


def test_shared_layers_would_share_a_cache():
    with pytest.raises(InputError, match="shared layers"):
        bench_assisted(gpt2(kind="shared"), PROMPTS, 8)
