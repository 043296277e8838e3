"""Text from CRT in transformers: equal to our own, or to decoding without a cache."""

import pytest
import torch
import transformers
from closeness import same
from tiny_hf import CASES, END, LEFT, MODELS, given_ids, wrapped
from tiny_models import ALL_OPTIONS

from crt_lib import InputError
from crt_lib.cached.memory import Memory
from crt_lib.exits.decode import generate
from crt_lib.exits.policy import Policy, run_with_exits
from crt_lib.hf.cache import CRTCache
from crt_lib.hf.model import CRTForCausalLM


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_greedy_text_is_ours(changes):
    model, hf = wrapped(**changes)
    ids = given_ids()
    texts = [row[mask.bool()].tolist() for row, mask in zip(ids, LEFT, strict=True)]
    expected = [one.tokens for one in generate(model, texts, 9)]
    for use_cache in (True, False):
        made = hf.generate(ids, attention_mask=LEFT, do_sample=False, use_cache=use_cache, **END)
        assert made[:, 10:].tolist() == expected


@pytest.mark.parametrize("policy", [Policy(fixed=3), Policy("confidence", 0.1, 0.0), 1])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_exit_policy_of_generate_is_ours(make, policy):
    model, hf = make()
    texts = given_ids()
    own = Policy(fixed=policy) if isinstance(policy, int) else policy
    expected = [one.tokens for one in generate(model, texts.tolist(), 9, policy=own)]
    for use_cache in (True, False):
        made = hf.generate(texts, exit_policy=policy, do_sample=False, use_cache=use_cache, **END)
        assert made[:, 10:].tolist() == expected
    out = hf(texts, exit_policy=policy)
    assert out.logits.shape == (3, 10, model.config.vocab_size) and out.exit_loops.shape == (3, 10)
    with pytest.raises(InputError, match="exit policy"):
        hf(texts, labels=texts, exit_policy=policy)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 9, "temperature": 1.3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=["beams", "beams returned", "sampling", "sampled beams", "penalties"],
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_other_decodings_are_those_without_a_cache(make, how):
    _, hf = make()
    made = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        made.append(
            hf.generate(given_ids(), attention_mask=LEFT, use_cache=use_cache, **how, **END)
        )
    assert torch.equal(*made)


def test_drafts_looked_up_in_the_prompt_change_no_text():
    _, hf = wrapped(**ALL_OPTIONS)
    ids = given_ids(1, 6).repeat(1, 3)
    plain = hf.generate(ids, do_sample=False, **END)
    assert torch.equal(plain, hf.generate(ids, do_sample=False, prompt_lookup_num_tokens=3, **END))


def test_a_conversation_goes_on_from_its_cache():
    _, hf = wrapped(**ALL_OPTIONS)
    ids = given_ids(2, 10)
    whole = hf(ids).logits
    first = hf(ids[:, :4], use_cache=True)
    second = hf(ids[:, 4:], past_key_values=first.past_key_values)
    same(torch.cat([first.logits, second.logits], 1), whole)
    cache = second.past_key_values
    assert isinstance(cache, CRTCache) and cache.get_seq_length() == 10
    cache.crop(torch.tensor(-6))
    same(hf(ids[:, 4:], past_key_values=cache).logits, whole[:, 4:])
    cache.crop(0)
    assert cache.get_seq_length() == 10
    made = hf.generate(ids[:, :5], do_sample=False, **END)
    first = hf(ids[:, :4], use_cache=True).past_key_values
    again = hf.generate(ids[:, :5], do_sample=False, past_key_values=first, **END)
    assert torch.equal(again, made) and first.get_seq_length() > 4
    with pytest.raises(InputError, match="holds 2 texts"):
        hf(ids[:1, :1], past_key_values=cache)
    with pytest.raises(InputError, match="max_seq_len"):
        hf(given_ids(2, 60), past_key_values=cache)
    with pytest.raises(InputError, match="CRTCache"):
        hf(ids, past_key_values=transformers.DynamicCache())


def test_streamers_and_stopping_criteria():
    _, hf = wrapped()
    ids, seen = given_ids(1, 5), []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    class AfterSeven(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7)

    made = hf.generate(ids, do_sample=False, streamer=Streamer(), **END)
    assert seen == [*made[0].tolist(), "end"]
    stopped = hf.generate(ids, do_sample=False, stopping_criteria=[AfterSeven()], **END)
    assert stopped.tolist() == made[:, :7].tolist()
    ended = hf.generate(ids, do_sample=False, eos_token_id=int(made[0, 6]), **END)
    assert ended[0].tolist() == made[0, : made[0].tolist().index(int(made[0, 6]), 5) + 1].tolist()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("first", [1, Policy("confidence")])
def test_full_depth_goes_on_from_a_cache_of_early_exits(make, first):
    model, hf = make()
    ids = given_ids()
    cache = hf(ids, exit_policy=first, use_cache=True).past_key_values
    found = hf(ids[:, :3], past_key_values=cache).logits  # outside no_grad, too
    memory = Memory(model.config, 3, 13, model.loop_encoding)
    policy = Policy(fixed=1) if first == 1 else first
    run_with_exits(model, ids, policy, memory)
    same(found, run_with_exits(model, ids[:, :3], Policy(), memory).logits)


@pytest.mark.parametrize("policy", [None, Policy("similarity")])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_prompts_as_embeddings_and_in_chunks(make, policy):
    _, hf = make()
    ids, how = given_ids(), {"do_sample": False, "exit_policy": policy, **END}
    expected = hf.generate(ids, **how)
    embedded = hf.get_input_embeddings()(ids)
    assert torch.equal(hf.generate(inputs_embeds=embedded, **how), expected[:, 10:])
    masked = hf.generate(ids, attention_mask=LEFT, **how)
    for size in (3, 4, 5):
        assert torch.equal(hf.generate(ids, prefill_chunk_size=size, **how), expected)
        chunked = hf.generate(ids, attention_mask=LEFT, prefill_chunk_size=size, **how)
        assert torch.equal(chunked, masked)


def test_a_mask_must_fit_the_cache():
    _, hf = wrapped()
    ids = given_ids()
    for mask, message in (
        (torch.ones(3, 2), "give"),
        (torch.ones(3, 11).index_fill(1, torch.tensor([4]), 0), "between"),
        (torch.ones(3, 11).index_fill(1, torch.tensor([0]), 0), "those the cache holds"),
    ):
        cache = hf(ids, use_cache=True).past_key_values
        with pytest.raises(InputError, match=message):
            hf(ids[:, :1], past_key_values=cache, attention_mask=mask)
    with pytest.raises(InputError, match="between"):  # padding on the right of a prompt
        hf.generate(ids, attention_mask=LEFT.flip(1), **END)


def test_a_policy_is_named_in_the_configuration_or_the_call():
    model, hf = wrapped()
    last = Policy(fixed=3)
    hf.config.calibrated = {"similarity": vars(Policy("similarity", 0.2, 0.1, exits=(1,)))}
    for unknown in ("auto", "confidence"):
        with pytest.raises(InputError, match=f"{unknown} was not calibrated.*crt calibrate"):
            hf(given_ids(), exit_policy=unknown)
    hf.config.calibrated["auto"] = vars(last)
    ids, end = given_ids(), {"do_sample": False, **END}
    for name, own in (("auto", last), ("similarity", Policy("similarity", 0.2, 0.1, exits=(1,)))):
        expected = [one.tokens for one in generate(model, ids.tolist(), 9, policy=own)]
        assert hf.generate(ids, exit_policy=name, **end)[:, 10:].tolist() == expected
        hf.generation_config.exit_policy = name
        assert hf.generate(ids, **end)[:, 10:].tolist() == expected
    hf.generation_config.exit_policy = "patience"
    with pytest.raises(InputError, match="'patience'"):
        hf.generate(ids, **end)


def test_the_exit_gate_travels(tmp_path, scored):
    model, data, _ = scored
    hf = CRTForCausalLM.from_crt(model)
    hf.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.from_numpy(data.valid.ids[:12].astype("int64"))[None]
    for tau in torch.linspace(0.5, 1, 400).tolist():  # the first at which exits differ
        policy = Policy("gate", tau, tau, 1.0)
        expected = generate(model, ids.tolist(), 15, policy=policy)[0]
        if len(set(expected.loops)) > 1:
            break
    assert len(set(expected.loops)) > 1
    for made in (hf, again):
        found = made.generate(
            ids, exit_policy=policy, do_sample=False, max_new_tokens=15, pad_token_id=0
        )
        assert found[0, 12:].tolist() == expected.tokens
    loose = wrapped()[1]
    with pytest.raises(InputError, match="no trained exit gate"):
        loose(given_ids(), exit_policy=Policy("gate"))
