"""What libraries make of a saved folder: of a random model, and of the one that is handed out.

Logits, texts and scores are those of the model itself.
"""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.testing import assert_close

from crt_lib.hf.export import export_run
from crt_lib.hf.model import CRTForCausalLM

ROOT = Path(__file__).parents[2]
WORDS = [f"w{i}" for i in range(37)]
GREEDY = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}


@pytest.fixture(scope="module", params=["random", "demo"])
def saved(request, tmp_path_factory):
    """A folder, its model, its tokenizer, two texts and the first text's ids (1, T)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        export_run(ROOT / "results" / "demo", folder)
        texts = ["The river is a tributary of the", "The song was released in"]
    else:
        torch.manual_seed(0)
        made = CRTForCausalLM.from_crt(random_model().eval())
        made.config.pad_token_id = made.generation_config.pad_token_id = 0
        made.save_pretrained(folder)
        words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w1"))
        words.pre_tokenizer = WhitespaceSplit()
        ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "w0")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, model_max_length=64, padding_side="left", **ends
        ).save_pretrained(folder)
        texts = ["w3 w4 w5 w9", "w7 w8"]
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return folder, hf, tokenizer, texts, tokenizer(texts[0], return_tensors="pt").input_ids


def nats(hf, ids, begin=1):
    """What `hf` gives to each of the ids (T,) from `begin` on."""
    with torch.no_grad():
        log_p = hf(ids[None]).logits[0].log_softmax(-1)
    return -log_p[range(begin - 1, len(ids) - 1), ids[begin:]]


def test_an_assistant_changes_no_text(saved):
    _, hf, _, _, ids = saved
    settings = hf.config.settings.replace(n_loops=2, exit_loops=())
    small = CRTForCausalLM.from_crt(type(hf.model)(settings).eval())
    plain = hf.generate(ids, **GREEDY)
    assert torch.equal(hf.generate(ids, assistant_model=small, **GREEDY), plain)
    assert torch.equal(hf.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), plain)


@pytest.mark.parametrize(
    "how",
    [{"device_map": "auto"}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}],
    ids=str,
)
def test_however_it_is_loaded_it_has_the_same_logits(saved, how):
    folder, hf, _, _, ids = saved
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    with torch.no_grad():
        assert_close(other(ids.to(other.device)).logits.cpu(), hf(ids).logits)


def test_weights_in_many_files(saved, tmp_path):
    _, hf, _, _, ids = saved
    hf.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in hf.parameters()) // 3)
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, hf(ids).logits)


def test_minicons_has_the_sums_of_our_losses(saved):
    scorer = pytest.importorskip("minicons.scorer")
    _, hf, tokenizer, texts, _ = saved
    asked = scorer.IncrementalLMScorer(hf, "cpu", tokenizer=tokenizer)
    found = asked.sequence_score(texts, reduction=lambda x: x.sum().item())
    own = [-nats(hf, tokenizer(t, return_tensors="pt").input_ids[0]).sum().item() for t in texts]
    assert found == pytest.approx(own, rel=1e-4)


def test_lm_eval_scores_and_continues(saved):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    _, hf, tokenizer, texts, _ = saved
    client = HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=2)

    def ask(kind, *rows):
        asked = [Instance(kind, {}, row, i) for i, row in enumerate(rows)]
        return getattr(client, kind)(asked, disable_tqdm=True)

    pairs = [text.rsplit(" ", 1) for text in texts]
    found = ask("loglikelihood", *((start, f" {end}") for start, end in pairs))
    for (start, _), text, (score, _) in zip(pairs, texts, found, strict=True):
        begin = len(tokenizer(start).input_ids)
        own = nats(hf, tokenizer(text, return_tensors="pt").input_ids[0], begin).sum()
        assert score == pytest.approx(-own.item(), rel=1e-4)
    until = {"until": ["<never>"], "max_gen_toks": 5, "do_sample": False}
    for text, more in zip(texts, ask("generate_until", *((t, until) for t in texts)), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = hf.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
        assert more.strip() == tokenizer.decode(made, skip_special_tokens=True).strip()
