"""CRT in transformers: what its shared model tests ask of a causal language model.

Not asked, because there is nothing of it: attention's weights as an output and attention without
fused kernels (they are never made), head pruning, static and quantised caches (the cache is our
own), flash attention, encoder inputs, token types, classification heads.
"""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from closeness import near, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_hf import CASES, END, LEFT, MODELS, given_ids, wrapped
from tiny_models import ALL_OPTIONS, SHARINGS, random_ids

from crt_lib import InputError
from crt_lib.exits.decode import generate
from crt_lib.hf.model import CRTConfig, CRTForCausalLM
from crt_lib.loss import total_loss


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_same_numbers_and_back_from_a_folder(changes, tmp_path):
    model, hf = wrapped(**changes)
    ids = given_ids()
    with torch.no_grad():
        expected, found = model(ids), hf(ids, output_exits=True)
        for logits, loop in zip(found.exit_logits, model.config.head_loops, strict=True):
            same(logits, expected[loop])
        same(found.logits, expected[model.config.n_loops])
        hf.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is CRTForCausalLM and again.config.settings == model.config
        same(again(ids).logits, found.logits)


def test_config_has_the_names_of_transformers(tmp_path):
    config = CRTConfig(hidden_size=32, num_hidden_layers=3, exit_loops=(1, 2), n_heads=4)
    assert (config.settings.d_model, config.settings.n_loops) == (32, 3)
    assert config.num_attention_heads == 4 and config.max_position_embeddings == 1024
    config.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).settings == config.settings
    with pytest.raises(InputError, match="n_heads"):
        CRTConfig(n_heads=0)


def test_a_folder_loads_where_crt_lib_is_not_installed(tmp_path):
    model, hf = wrapped(**ALL_OPTIONS)
    hf.save_pretrained(tmp_path / "model")
    script = """
import sys, torch
sys.modules["crt_lib"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(1, 9)[None]
made = model.generate(ids, max_new_tokens=6, pad_token_id=0, do_sample=False)
model.save_pretrained(sys.argv[2])
print(made[0, 8:].tolist())
"""
    folders = [str(tmp_path / "model"), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", script, *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    expected = generate(model, [list(range(1, 9))], 6)[0].tokens
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    saved = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
    assert saved == {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_loss_is_that_of_intermediate_supervision(sharing):
    model, hf = wrapped(head_sharing=sharing)
    ids = given_ids()
    labels = ids.clone()
    labels[1, 6:] = -100
    found = hf(ids, labels=labels)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = total_loss(model(ids, targets=targets), 0.3)
    near(found.loss, expected, 100)  # transformers' loss: float32, of 27 tokens and 37 logits each
    assert len(found.exit_logits) == len(model.config.head_loops)
    scored = int((targets != -100).sum())
    halves = [
        hf(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=scored).loss
        for i in range(3)
    ]
    near(sum(halves), expected, 100)  # as the Trainer accumulates


def test_forward_signature_and_outputs():
    _, hf = wrapped()
    names = list(inspect.signature(hf.forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"]
    assert {"past_key_values", "inputs_embeds", "labels", "use_cache", "logits_to_keep"} <= set(
        names
    )
    ids = given_ids()
    with torch.no_grad():
        whole = hf(ids, output_hidden_states=True)
        assert torch.equal(hf(ids, return_dict=False)[0], whole.logits)
        same(hf(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
        same(hf(inputs_embeds=hf.get_input_embeddings()(ids)).logits, whole.logits)
        assert torch.equal(hf(ids).logits, whole.logits)  # the same every time
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": ids.float()}):
        with pytest.raises(InputError, match="one of the two"):
            hf(**wrong)


def test_hidden_states_are_those_of_the_loops():
    model, hf = wrapped(**ALL_OPTIONS)
    ids = given_ids()
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
        assert len(states) == model.config.n_loops + 1
        for loop, z in model.hidden_states(ids, model.config.n_loops):
            same(states[loop], z)
        cached = hf(ids[:, :4], use_cache=True, output_hidden_states=True)
        rest = hf(ids[:, 4:], past_key_values=cached.past_key_values, output_hidden_states=True)
    for first, second, whole in zip(cached.hidden_states, rest.hidden_states, states, strict=True):
        same(torch.cat([first, second], 1), whole)


def test_gradients_reach_every_parameter_and_the_states():
    _, hf = wrapped()
    out = hf(given_ids(), labels=given_ids(), output_hidden_states=True)
    out.hidden_states[-1].retain_grad()
    out.loss.backward()
    assert out.hidden_states[-1].grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hf.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    _, plain = wrapped()
    _, less = wrapped()
    less.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for hf in (plain.train(), less.train()):
        hf(given_ids(), labels=given_ids()).loss.backward()
    assert less.model.gradient_checkpointing
    for (name, a), b in zip(plain.named_parameters(), less.parameters(), strict=True):
        same(a.grad, b.grad, name)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_padding_on_either_side_and_batching_change_nothing(changes):
    _, hf = wrapped(**changes)
    ids = given_ids()
    right = LEFT.flip(1)
    with torch.no_grad():
        for mask in (LEFT, right):
            together = hf(ids, attention_mask=mask, output_hidden_states=True)
            cached = hf(ids, attention_mask=mask, use_cache=True).logits
            for i, row in enumerate(mask.bool()):
                alone = hf(ids[i : i + 1, row], output_hidden_states=True)
                same(together.logits[i, row], alone.logits[0])
                same(together.hidden_states[-1][i, row], alone.hidden_states[-1][0])
                same(cached[i, row], alone.logits[0])
    holes = LEFT.clone()
    holes[1, 7] = 0
    with pytest.raises(InputError, match="between a row's tokens"):
        hf(ids, attention_mask=holes)
    with pytest.raises(InputError, match="attention_mask is"):
        hf(ids, attention_mask=LEFT[:, :4])


def test_a_model_that_sees_the_future_refuses_padding_and_caches():
    _, hf = wrapped(causal=False)
    hf(given_ids(), attention_mask=torch.ones_like(LEFT))
    with pytest.raises(InputError, match="sees the future"):
        hf(given_ids(), attention_mask=LEFT)
    with pytest.raises(InputError, match="sees the future"):
        hf(given_ids(), use_cache=True)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_resized_embeddings_resize_every_head(sharing, tmp_path):
    _, hf = wrapped(head_sharing=sharing)
    ids = given_ids()
    before = hf(ids).logits
    for size in (45, 40):
        hf.resize_token_embeddings(size)
        out = hf(ids, labels=ids)
        assert hf.config.vocab_size == hf.model.config.vocab_size == size
        assert {logits.shape[-1] for logits in out.exit_logits} == {size}
        same(out.logits[..., :37], before)
    assert hf.get_input_embeddings().weight.shape[0] == 40
    hf(torch.full((1, 3), 39))
    hf.save_pretrained(tmp_path)
    again = CRTForCausalLM.from_pretrained(tmp_path)
    same(again(ids).logits, hf(ids).logits)


def test_tied_weights_are_one_parameter_and_saved_once(tmp_path):
    _, hf = wrapped(**ALL_OPTIONS)
    hf.save_pretrained(tmp_path)
    for made in (hf, CRTForCausalLM.from_pretrained(tmp_path)):
        assert made.lm_head.weight is made.model.embed.tokens.weight
        assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
        made.resize_token_embeddings(50)
        assert made.lm_head.weight is made.model.embed.tokens.weight
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    loose = wrapped(head_sharing="separate")[1]
    assert not loose.config.tie_word_embeddings and not hasattr(loose, "lm_head")


def test_bad_input_is_refused():
    _, hf = wrapped()
    with pytest.raises(InputError, match="outside the vocabulary"):
        hf(torch.tensor([[1, 37]]))
    with pytest.raises(InputError, match="max_seq_len"):
        hf(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(InputError, match="max_seq_len"):
        hf(inputs_embeds=torch.zeros(1, 65, 8))


@pytest.mark.parametrize("name", ["all", "demo"])
def test_trainer_trains_saves_and_resumes(tmp_path, name):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(32, 12).clamp(min=1).tolist()]

    def run(folder, steps, resume=None):
        torch.manual_seed(3)
        _, hf = MODELS[name]()
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(hf, arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert whole.evaluate()["eval_loss"] < losses[0]
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 4, resume=str(tmp_path / "half" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        same(a, b)


def test_half_precision_is_near():
    _, hf = wrapped()
    ids = given_ids()
    whole = hf(ids).logits
    half = hf.to(torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert F.cosine_similarity(half(ids).logits.float(), whole, dim=-1).min() > 0.99
    assert half.generate(ids, do_sample=False, **END).shape == (3, 19)


def test_what_a_folder_lacks_is_as_in_a_new_model(tmp_path):
    _, hf = wrapped(**ALL_OPTIONS)
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = ["model.block.attention.qkv.weight", "model.injection", "model.block.norm1.weight"]
    kept = {name: value for name, value in weights.items() if name not in gone}
    save_file(kept, file, {"format": "pt"})
    found = CRTForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in kept.items():
        assert torch.equal(found[name], value)
    assert torch.equal(found[gone[1]], torch.zeros(16))
    assert torch.equal(found[gone[2]], torch.ones(16))
    assert 0 < found[gone[0]].std() < 1
    save_file(weights, file, {"format": "pt"})
    other = CRTForCausalLM.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    assert other(torch.tensor([[49, 3]])).logits.isfinite().all()
    assert other.lm_head.weight.shape == (50, 16) and other.lm_head.weight.abs().max() < 10


def test_precision_and_what_is_not_saved(tmp_path):
    model, _ = wrapped()
    assert CRTForCausalLM.from_crt(model.bfloat16()).dtype == torch.bfloat16
    hf = wrapped()[1]
    hf.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))
    with pytest.raises(InputError, match="aux_weight"):
        CRTConfig(aux_weight=7)
