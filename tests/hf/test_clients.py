"""Libraries around a model, tiny or the committed one, give what it gives, or refuse in one line.

Greedy text with drafts is that without; a compiled or exported model has the same logits; adapters
and hooks act in cached decoding as in a whole pass; what cannot be done is an InputError.
"""

from functools import partial

import pytest
import torch
import transformers
from closeness import same
from tiny_hf import END, LEFT, MODELS, TWO, demo, given_ids, wrapped

from crt_lib import InputError
from crt_lib.audit.causality import causality_report
from crt_lib.exits.policy import Policy
from crt_lib.hf.export import _write_program, export_program
from crt_lib.hf.model import CRTForCausalLM
from crt_lib.hf.targets import load_target

GREEDY = {"do_sample": False, **END}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_drafts_of_an_early_exit_change_no_text(make):
    _, hf = make()
    ids = given_ids(1)
    for policy in (None, 3):
        plain = hf.generate(ids, exit_policy=policy, **GREEDY)
        drafted = hf.generate(ids, exit_policy=policy, assistant_early_exit=1, **GREEDY)
        assert torch.equal(drafted, plain)
    with pytest.raises(InputError, match="no head"):
        hf.generate(ids, assistant_early_exit=9, **GREEDY)


@pytest.mark.parametrize("make", TWO.values(), ids=TWO)
def test_a_draft_has_its_own_exits(make):
    _, hf = make()
    ids, seen = given_ids(1), []
    forward = hf.forward

    def watched(*args, exit_policy=None, **kwargs):
        seen.append(exit_policy)
        return forward(*args, exit_policy=exit_policy, **kwargs)

    hf.forward = watched
    hf.generation_config.exit_policy = 3
    hf.generate(ids, assistant_early_exit=1, **GREEDY)
    assert set(seen) == {1, 3}


@pytest.mark.parametrize(
    "make", [MODELS["paper"], MODELS["all"], demo], ids=["paper", "all", "demo"]
)
def test_a_graph_has_the_same_logits(make):
    _, hf = make()
    ids = given_ids()
    compiled = torch.compile(hf, fullgraph=True, backend="eager")
    with torch.no_grad():
        same(compiled(ids).logits, hf(ids).logits)
        padded = compiled(ids, attention_mask=LEFT).logits
        same(padded[LEFT.bool()], hf(ids, attention_mask=LEFT).logits[LEFT.bool()])
        program = torch.export.export(hf, (ids,)).module()
        same(program(ids).logits, hf(ids).logits)


@pytest.mark.parametrize("make", TWO.values(), ids=TWO)
@pytest.mark.parametrize("saved", [3, {"fixed": 3}, Policy(fixed=3), "similarity"])
def test_a_saved_exit_policy_acts(make, saved, tmp_path):
    _, hf = make()
    hf.config.calibrated = {"similarity": vars(Policy("similarity"))}
    hf.generation_config.exit_policy = saved
    hf.save_pretrained(tmp_path)
    again = CRTForCausalLM.from_pretrained(tmp_path)
    ids = given_ids()
    expected = hf.generate(ids, exit_policy=saved, **GREEDY)
    assert torch.equal(again.generate(ids, **GREEDY), expected)
    assert again.generation_config.exit_policy is not None


def test_a_nonsense_exit_policy_is_refused_and_not_saved(tmp_path):
    _, hf = wrapped()
    for wrong in ("nonsense", 1.5, True, [1]):
        hf.generation_config.exit_policy = wrong
        with pytest.raises(InputError, match=r"is not one of|exit_policy is"):
            hf.generate(given_ids(), **GREEDY)
        with pytest.raises(InputError, match=r"is not one of|exit_policy is"):
            hf.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", TWO.values(), ids=TWO)
def test_what_would_be_left_out_is_refused(make):
    _, hf = make()
    ids = given_ids()
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(InputError, match="CRTCache"):
            hf.generate(ids, cache_implementation=kind, **GREEDY)
    with pytest.raises(InputError, match="never made"):
        hf(ids, output_attentions=True)
    with pytest.raises(InputError, match="its own row"):
        hf(ids, position_ids=torch.tensor([[*range(5), *range(5)]]))
    hf(ids, position_ids=torch.arange(10)[None])
    with pytest.raises(InputError, match="continuous batching"):
        hf.generate_batch(ids.tolist())
    with pytest.raises(InputError, match="compute_loss"):
        _ = hf(ids).last_hidden_state
    for kind in ("flex_attention", "flash_attention_2"):
        with pytest.raises(ValueError, match="does not support"):
            hf.set_attn_implementation(kind)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_hook_after_a_loop_acts_with_and_without_a_cache(make):
    _, hf = make()
    ids = given_ids()
    states = hf(ids, attention_mask=LEFT, output_hidden_states=True).hidden_states
    seen = []
    handle = hf.after_loop["2"].register_forward_hook(lambda _, __, out: seen.append(out))
    hf(ids, attention_mask=LEFT)
    assert torch.equal(seen[0], states[2])
    handle.remove()
    plain = hf.generate(ids, **GREEDY)
    hf.after_loop["2"].register_forward_hook(lambda _, __, out: out.flip(-1))
    hooked = [hf.generate(ids, use_cache=cached, **GREEDY) for cached in (True, False)]
    assert torch.equal(*hooked) and not torch.equal(hooked[0], plain)
    with pytest.raises(InputError, match="no loss, states or hooks"):
        hf(ids, exit_policy=3)


@pytest.mark.parametrize("make", TWO.values(), ids=TWO)
def test_a_hook_of_any_part_acts_with_a_cache(make):
    _, hf = make()
    hf.model.block.register_forward_hook(lambda _, __, out: out.flip(-1))
    made = [hf.generate(given_ids(), use_cache=cached, **GREEDY) for cached in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["full embedding, tied", "all", "demo"])
def test_adapters_act_with_a_cache_train_and_merge(name):
    peft = pytest.importorskip("peft")
    _, hf = MODELS[name]()
    ids = given_ids()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapted = peft.get_peft_model(hf, config).double()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    made = [adapted.generate(input_ids=ids, use_cache=c, **GREEDY) for c in (True, False)]
    assert torch.equal(*made)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(ids, **GREEDY), made[0])


def test_a_wrapped_head_is_refused():
    _, hf = wrapped()
    name = next(iter(hf.model.heads))
    hf.model.heads[name] = torch.nn.Sequential(hf.model.heads[name])
    with pytest.raises(InputError, match="exclude_modules"):
        hf(given_ids())


@pytest.mark.parametrize("make", TWO.values(), ids=TWO)
def test_sft_trains_every_exit(make, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    _, hf = make()
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}

    class Exits(trl.SFTTrainer):
        compute_loss = transformers.Trainer.compute_loss

    rows = datasets.Dataset.from_dict({"input_ids": given_ids(8).tolist()})
    arguments = {"max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False, "max_length": 16}
    how = trl.SFTConfig(str(tmp_path), save_strategy="no", disable_tqdm=True, **arguments)
    words = {"<pad>": 0, "<eos>": 1}
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), pad_token="<pad>", eos_token="<eos>"
    )
    Exits(hf, args=how, train_dataset=rows, processing_class=tokenizer).train()
    assert all(not torch.equal(p, before[name]) for name, p in hf.named_parameters())


@pytest.mark.parametrize("make", TWO.values(), ids=TWO)
def test_an_onnx_file_has_the_same_logits(make, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _ = make()
    model = model.float()
    path = tmp_path / "model.onnx"
    assert _write_program(export_program(model), path) == path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = given_ids(2, 7)
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        expected = model(ids)[model.config.n_loops]
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "make", [wrapped, demo, partial(wrapped, causal=False)], ids=["causal", "demo", "symmetric"]
)
def test_the_audit_judges_an_onnx_file(tmp_path, make):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, _ = make()
    path = _write_program(export_program(model.float()), tmp_path / "model.onnx")
    asked, size = load_target(str(path))
    report = causality_report(asked, size or model.config.vocab_size, seconds=1)
    assert report.status == (0 if model.config.causal else 1), str(report)
    (tmp_path / "none.onnx").write_bytes(b"text")
    with pytest.raises(InputError, match="is no ONNX model"):
        load_target(str(tmp_path / "none.onnx"))
