"""Right answers of the language of look-ups, counted by exit and by look-ups needed."""

import numpy as np
import pytest
import torch
from torch import nn

from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.study.lookups import gate_exits, lines_of, right_answers, staircase
from crt_lib.text import lookup
from crt_lib.text.corpus import Corpus, Split
from crt_lib.text.tokenizer import load_tokenizer, tokenize

TEXT = lookup.sample(40, 0)
CORPUS = Corpus("lookup", Split(TEXT), Split(TEXT), Split(TEXT))
DATA = tokenize(CORPUS, load_tokenizer("word", CORPUS))


class Knows(nn.Module):
    """Exit l answers what needs at most l look-ups, and else the line end."""

    def forward(self, ids):
        _, _, steps = lines_of(DATA.test)
        columns = np.arange(lookup.TABLE + 2, lookup.LENGTH - 1, 3)
        out = {}
        for loop in (1, 2, 3, 4):
            logits = torch.zeros(*ids.shape, DATA.tokenizer.vocab_size)
            known = torch.from_numpy(steps <= loop)
            answers = torch.where(known, ids[:, columns], 0)
            logits[:, columns - 1] = nn.functional.one_hot(answers, logits.shape[-1]).float()
            out[loop] = logits
        return out


def test_a_model_that_knows_a_look_up_a_loop_is_a_staircase():
    rows = right_answers(Knows(), DATA.test)
    assert np.array_equal(staircase(rows).to_numpy(), np.triu(np.ones((4, 4))).T)
    assert sum(row["asked"] for row in rows if row["loop"] == 1) == 40
    assert [row["right_all"] for row in rows] == [row["right"] for row in rows]


def test_text_of_another_language_is_refused():
    text = Split("a b c\n")
    other = Corpus("x", text, text, text)
    with pytest.raises(InputError, match="corpus 'lookup'"):
        lines_of(tokenize(other, load_tokenizer("word", other)).test)


CONFIG = ModelConfig(
    vocab_size=DATA.tokenizer.vocab_size,
    d_model=16,
    n_heads=2,
    n_loops=3,
    n_cycles=1,
    exit_loops=(1, 2),
    max_seq_len=lookup.LENGTH,
    residual="pre",
    exit_norm=True,
    positions="rotary",
    head_sharing="tied",
)


def test_a_model_is_run_with_more_loops_than_it_has():
    torch.manual_seed(0)
    model = CRT(CONFIG)
    few, many = (staircase(right_answers(model, DATA.test, n)) for n in (None, 5))
    assert list(few.index) == [1, 2, 3] and list(many.index) == [1, 2, 3, 4, 5]
    assert few.equals(many.loc[:3])


def test_a_gate_exits_sooner_the_farther_it_may_be():
    torch.manual_seed(0)
    model = CRT(CONFIG)
    steps, never = gate_exits(model, DATA, -1.0)
    assert steps.tolist() == lines_of(DATA.test)[2][:, 0].tolist()
    assert set(never) == {3}
    assert set(gate_exits(model, DATA, 1e9)[1]) == {1}
    assert (gate_exits(model, DATA, 0.01)[1] >= gate_exits(model, DATA, 0.1)[1]).all()
