"""Right answers of the language of look-ups, counted by exit and by look-ups needed."""

import numpy as np
import pytest
import torch
from torch import nn

from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.study.lookups import deeper, lines_of, right_answers, staircase
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
    assert np.array_equal(staircase(rows), np.triu(np.ones((4, 4))).T)
    assert sum(row["asked"] for row in rows if row["exit"] == 1) == 40
    assert [row["right_all"] for row in rows] == [row["right"] for row in rows]


def test_text_of_another_language_is_refused():
    text = Split("a b c\n")
    other = Corpus("x", text, text, text)
    with pytest.raises(InputError, match="corpus 'lookup'"):
        lines_of(tokenize(other, load_tokenizer("word", other)).test)


def test_more_loops_go_on_as_the_last():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=21,
        d_model=16,
        n_heads=2,
        n_loops=3,
        n_cycles=1,
        exit_loops=(1, 2),
        max_seq_len=64,
        residual="pre",
        exit_norm=True,
        injection=True,
        positions="rotary",
        head_sharing="tied",
        embed_dim=16,
    )
    model = CRT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    made = deeper(model, 5)
    ids = torch.randint(21, (2, 12))
    with torch.no_grad():
        few, many = model(ids), made(ids)
        assert list(many) == [1, 2, 3, 4, 5]
        for loop, logits in few.items():
            assert torch.equal(logits, many[loop])
        z, embedded = model.begin(ids)
        for loop in (1, 2, 3, 3, 3):
            z = model.apply_loop(loop, z, embedded)
        features, weight = model.readout(3, z)
        assert torch.equal(features @ weight.T, many[5])
    with pytest.raises(InputError, match="give more"):
        deeper(model, 3)
