"""The GPT-2 baseline is transformers' own, with the face of CRT."""

import pytest
import torch
import torch.nn.functional as F
from closeness import OF_A_MODEL, roundings, same
from tiny_models import count_parameters

from crt_lib import InputError, evaluate, load_corpus, load_tokenizer, tokenize, train
from crt_lib.audit.accounting import multiply_adds
from crt_lib.checkpoint import load_model
from crt_lib.config import GPT2Config, ModelConfig, TrainConfig, config_from_dict, make_model

TINY = GPT2Config(vocab_size=53, d_model=24, n_heads=3, n_layers=2, max_seq_len=32, dropout=0.0)


def test_it_is_gpt2_with_a_tied_head():
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    ours = make_model(TINY).eval().double()
    theirs = GPT2LMHeadModel(ours.transformer.config).eval().double()
    theirs.transformer.load_state_dict(ours.transformer.state_dict())
    theirs.tie_weights()
    ids = torch.randint(53, (2, 17))
    logits = theirs(ids).logits
    same(ours(ids)[2], logits)
    targets = torch.randint(53, (2, 17))
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    same(ours(ids, targets=targets)[2], plain)
    ours.gradient_checkpointing = True
    same(ours.train()(ids, targets=targets)[2], plain)
    assert ours.gradient_checkpointing

    with pytest.raises(InputError, match=r"one exit, 2; asked for \(1,\)"):
        ours(ids, exits=(1,))


def test_a_shared_layer_is_a_gpt2_of_equal_layers():
    torch.manual_seed(0)
    shared = make_model(TINY.replace(kind="shared", n_layers=3)).eval().double()
    plain = make_model(TINY.replace(n_layers=3)).eval().double()
    weights = plain.state_dict()
    for name, value in shared.state_dict().items():
        layers = range(3) if ".h.layer." in name else (0,)
        weights |= {name.replace(".h.layer.", f".h.{i}."): value for i in layers}
    plain.load_state_dict(weights)
    ids = torch.randint(53, (2, 17))
    same(shared(ids)[3], plain(ids)[3])
    one = make_model(TINY.replace(n_layers=1))
    assert count_parameters(shared) == count_parameters(one) < count_parameters(plain)
    assert multiply_adds(shared.config, 17) == multiply_adds(plain.config, 17)
    shared.gradient_checkpointing = True
    same(shared.train()(ids)[3], plain(ids)[3])


@pytest.mark.parametrize("kind", ["gpt2", "shared"])
def test_it_trains_resumes_and_is_loaded(tmp_path, kind):
    corpus = load_corpus("grammar")
    data = tokenize(corpus, load_tokenizer("word", corpus))
    config = TINY.replace(vocab_size=data.tokenizer.vocab_size, kind=kind)
    settings = TrainConfig(seq_len=32, batch_size=4, grad_accum=1, max_lr=1e-2, eval_tokens=512)
    settings = settings.replace(updates=6, eval_every=0, optimizer="muon")
    result = train(config, settings, data, tmp_path, progress=False)
    assert result.finished and result.metrics[-1]["valid_loss_2"] < 4
    loaded = load_model(tmp_path / "checkpoints" / "best.safetensors")
    assert loaded.config == config
    whole = evaluate(loaded, data.valid, data.tokenizer.eot_id, seq_len=32, max_tokens=512)
    stored = result.metrics[-1]["valid_loss_2"]
    assert whole.loss[2] == pytest.approx(stored, rel=roundings(OF_A_MODEL))


def test_configurations_come_back_as_their_kind():
    for config in (TINY, TINY.replace(kind="shared")):
        assert config_from_dict(config.to_dict()) == config
    assert config_from_dict(ModelConfig().to_dict()) == ModelConfig()
    with pytest.raises(InputError, match="d_model 24 is not divisible by n_heads 5"):
        TINY.replace(n_heads=5)
