"""The memory of a decoding: it grows, its rows are chosen anew, and no step costs more."""

import pytest
import torch
from closeness import same
from tiny_models import ALL_OPTIONS, CAUSAL, exact_model, random_ids
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crt_lib import InputError
from crt_lib.cached.memory import Memory
from crt_lib.exits.policy import Policy, run_with_exits


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_memory_grows_and_its_rows_are_chosen_anew(changes):
    model, ids = exact_model(**changes), random_ids(3, 12)
    rows = torch.tensor([2, 0, 0, 1])
    whole = run_with_exits(model, ids[rows], Policy())
    memory = Memory(model.config, 3, 5, model.loop_encoding)
    run_with_exits(model, ids[:, :5], Policy(), memory)
    memory.reserve(12)
    memory.select(rows)
    rest = run_with_exits(model, ids[rows, 5:], Policy(), memory)
    same(rest.logits, whole.logits[:, 5:])
    with pytest.raises(InputError, match="max_seq_len"):
        memory.reserve(model.config.max_seq_len + 1)


@pytest.mark.parametrize("changes", [{}, ALL_OPTIONS], ids=["paper", "all options"])
def test_a_step_costs_the_same_however_long_the_text_is(changes):
    """Beyond attention, which reads a key and a value of every token in every block."""
    model, ids = exact_model(**changes), random_ids(1, 50)
    config, counts = model.config, {}
    for length in (10, 40):
        memory = Memory(config, 1, 50, model.loop_encoding)
        run_with_exits(model, ids[:, :length], Policy(), memory)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run_with_exits(model, ids[:, length : length + 1], Policy(), memory)
        counts[length] = counter.get_total_flops()
    blocks = config.n_prelude + config.n_loops
    assert counts[40] - counts[10] == 30 * blocks * 2 * 2 * config.d_model  # keys and values
