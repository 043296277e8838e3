"""Reports on anybody's model: padding, speed, parameters; models by name."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from closeness import SAME, same
from safetensors.torch import save_file
from tiny_hf import gpt2
from tiny_models import count_parameters, exact_model, random_model
from torch import nn

import crt_lib
from crt_lib import InputError, causality_report
from crt_lib.audit import padding_report, parameter_report, speed_report
from crt_lib.audit.accounting import multiply_adds
from crt_lib.config import ModelConfig
from crt_lib.hf.targets import load_target

VOCAB = 37
LINES = [np.random.default_rng(i).integers(1, VOCAB, 5 + 3 * i) for i in range(8)]


def uniform(ids):
    return torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)


@pytest.mark.parametrize("make", [exact_model, lambda: gpt2().double(), lambda: uniform])
def test_padding_that_is_not_scored_changes_nothing_for_a_causal_model(make):
    report = padding_report(make(), LINES, 0, seq_len=20)
    real = sum(min(len(line), 20) - 1 for line in LINES)
    assert report.share == pytest.approx(1 - real / (len(LINES) * 19))
    for loop in report.scored:
        assert report.ignored[loop] == pytest.approx(report.absent[loop], **SAME)


def test_speed_by_count_is_torchs_count():
    model = random_model().train()
    config = model.config
    report = speed_report(model, VOCAB, seq_len=16, repeats=1)
    assert model.training
    assert [row["exit"] for row in report.rows] == list(config.head_loops)
    whole = sum(multiply_adds(config, 16, (config.n_loops,)).values()) / 1e6
    for row in report.rows:
        loop = row["exit"]
        before = tuple(own for own in config.head_loops if own <= loop)
        assert row["claimed"] == config.n_loops / loop and row["ms"] > 0
        taps = 3 * config.d_model * (loop * config.n_cycles + config.n_embed_cycles)
        assert row["by torch"] == pytest.approx(row["multiply-adds"] - taps / 1e6)
        assert row["ratio"] == pytest.approx(whole / row["multiply-adds"])
        asking = sum(multiply_adds(config, 16, before).values()) / 1e6
        assert row["asking heads"] == pytest.approx(whole / asking)
    assert "claimed" in str(report)


@pytest.mark.parametrize("make", [gpt2, lambda: uniform])
def test_speed_of_a_model_without_exits(make):
    report = speed_report(make(), VOCAB, seq_len=8, repeats=1)
    (row,) = report.rows
    assert row["exit"] == 0 and np.isnan(row["multiply-adds"]) and row["ms"] > 0
    assert (row["by torch"] > 0) == (make is gpt2)
    assert str(report).splitlines()[1].split()[:4] == ["0", "-", "-", "-"]


def test_the_papers_parameters():
    report = parameter_report(ModelConfig(head_sharing="separate", causal=False))
    assert report.total == report.others["heads separate"] == 143_516_928
    assert report.others["heads shared_aux"] == 92_053_760
    assert f"{92_053_760:,}" in str(report)


def test_parameters_that_are_used_twice_count_once():
    model = gpt2()
    report = parameter_report(model)
    assert report.total == count_parameters(model)
    untied = report.others["each use with its own"]
    assert untied == report.total + VOCAB * 16  # the head is the embedding
    tiny = random_model()
    assert parameter_report(tiny).total == count_parameters(tiny)
    with pytest.raises(InputError, match="no parameters"):
        parameter_report(uniform)


def test_models_by_name(tmp_path, monkeypatch):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    model, size = load_target(f"hf:{tmp_path / 'theirs'}")
    assert size == VOCAB
    ids = torch.arange(6)[None]
    same(model.double()(ids).logits, theirs.double()(ids).logits)

    (tmp_path / "somebodys.py").write_text(
        "import torch\n"
        "def logits(ids):\n    return torch.zeros(*ids.shape, 9)\n"
        "def build():\n    return torch.nn.Embedding(9, 9)\n"
        "made = build()\n"
        "number = 3\n"
        "def breaks(ids):\n    raise ValueError(ids.shape)\n"
    )
    (tmp_path / "exits.py").write_text("import sys\nlogits = len\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    try:
        for name in ("logits", "build", "made"):
            found, _ = load_target(f"somebodys:{name}", vocab_size=9)
            assert found(ids).shape == (1, 6, 9)
        assert load_target("somebodys:logits")[1] == 9  # as many as it has logits
        for name, message in (
            ("somebodys:breaks", "give --vocab-size"),
            ("somebodys:number", "neither a model nor a function"),
            ("somebodys:nothing", "cannot be imported"),
            ("nobodys:logits", "cannot be imported"),
            ("exits:logits", "cannot be imported: SystemExit"),
        ):
            with pytest.raises(InputError, match=message):
                load_target(name)
    finally:
        sys.modules.pop("somebodys", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hub/nowhere is not a causal.*hf download"):
        load_target("hf:hub/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a causal model"):
        load_target(f"hf:{tmp_path / 'empty'}")


REFUSED = {
    "encoder-decoder": {"model_type": "t5", "is_encoder_decoder": True},
    "both sides": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "from both sides": {"model_type": "llada", "architectures": ["LLaDAModelLM"]},
}


@pytest.mark.parametrize("why, config", REFUSED.items())
def test_models_that_are_no_causal_ones_are_refused(why, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=why):
        load_target(f"hf:{tmp_path}")


def small(name, **sizes):
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, **sizes}
    return getattr(transformers, f"{name}Config")(**shape)


OTHERS = {
    "both sides": lambda: transformers.BertForMaskedLM(
        small("Bert", num_hidden_layers=1, intermediate_size=16)
    ),
    "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
        small("T5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "a diffusion": lambda: Diffusion(9, 9),
}


class Diffusion(nn.Embedding):
    config = SimpleNamespace(model_type="llada", vocab_size=9)


@pytest.mark.parametrize("why", OTHERS)
def test_from_python_too_they_are_refused(why):
    with pytest.raises(InputError, match=why):
        causality_report(OTHERS[why]())


def test_a_bert_as_a_causal_model_is_judged():
    config = small("Bert", num_hidden_layers=1, intermediate_size=16, is_decoder=True)
    assert crt_lib.audit(transformers.BertLMHeadModel(config), seconds=1).status == 0
    config.is_decoder = False
    assert crt_lib.audit(transformers.BertLMHeadModel(config), seconds=1).leaks


class Counts(nn.Module):
    """Sound, of any number of rows and positions."""

    def forward(self, ids):
        return F.one_hot(ids, 9).cumsum(1).float()


def exported(path, rows, positions, shape):
    dynamic = {0: rows, 1: positions}
    program = torch.export.export(
        Counts(), (torch.zeros(shape, dtype=torch.int64),), dynamic_shapes=(dynamic,)
    )
    torch.export.save(program, path)
    return path


def test_a_program_of_torch_export(tmp_path):
    rows, positions = torch.export.Dim("rows", min=1), torch.export.Dim("T", min=2, max=40)
    model, size = load_target(str(exported(tmp_path / "any.pt2", rows, positions, (2, 8))))
    report = causality_report(model, size)
    assert size == 9 and report.context == 40 and report.status == 0
    assert "rows" in report.findings
    fixed, _ = load_target(str(exported(tmp_path / "fixed.pt2", None, None, (1, 8))))
    ids = torch.randint(9, (1, 5))
    assert torch.equal(fixed(ids), Counts()(ids))
    report = causality_report(fixed, 9)
    assert report.context == report.length == 8 and report.status == 0
    assert "takes 1 rows of 8 tokens" in report.left_out["rows"]
    with pytest.raises(InputError, match="not there"):
        load_target(str(tmp_path / "nowhere.pt2"))


def test_an_onnx_file(tmp_path, monkeypatch):
    """Held against a stand-in: what is asked of onnxruntime is its documented interface."""
    path = tmp_path / "model.onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'crt-lm\[onnx\]'"):
        load_target(str(path))

    class Session:
        def __init__(self, path, providers):
            assert providers == ["CPUExecutionProvider"]

        def get_inputs(self):
            kinds = {"input_ids": "tensor(int64)", "attention_mask": "tensor(int32)"}
            return [SimpleNamespace(name=n, type=k, shape=["rows", 12]) for n, k in kinds.items()]

        def get_outputs(self):
            return [SimpleNamespace(name="cache"), SimpleNamespace(name="logits")]

        def run(self, names, feed):
            assert names == ["logits"] and feed["attention_mask"].dtype == np.int32
            return [Counts()(torch.from_numpy(feed["input_ids"])).numpy()]

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    with pytest.raises(InputError, match="not there"):
        load_target(str(path))
    path.touch()
    model, size = load_target(str(path))
    ids = torch.randint(9, (2, 7))
    assert torch.equal(model(ids), Counts()(ids))
    report = causality_report(model, size)
    assert report.status == 0 and report.context == 12 and "rows" in report.findings


def test_a_file_of_weights_and_its_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "owned.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Embedding):\n    def __init__(self):\n        super().__init__(9, 9)\n"
        "def wide():\n    return torch.nn.Embedding(9, 10)\n"
        "def none():\n    return 3\n"
    )
    weights = {"weight": torch.randn(9, 9)}
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    save_file(weights, tmp_path / "w.safetensors")
    files = {"w.pt": weights, "w.pth": {"model": prefixed, "step": 3}, "w.bin": prefixed}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    for name in [*files, "w.safetensors"]:
        model, size = load_target(str(tmp_path / name), made_by="owned:Net")
        assert size == 9 and torch.equal(model.weight, weights["weight"]) and not model.training
    (tmp_path / "text.pt").write_text("text")
    torch.save(Counts(), tmp_path / "whole.pt")
    for name, by, message in (
        ("w.pt", "owned:wide", "does not fit the class"),
        ("w.pt", "owned:none", "makes a int"),
        ("w.pt", None, "--class module:Class"),
        ("nowhere.pt", "owned:Net", "not there"),
        ("text.pt", "owned:Net", "no state_dict"),
        ("whole.pt", "owned:Net", "nothing else is unpickled"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            load_target(str(tmp_path / name), made_by=by)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_program_is_one_line(content, tmp_path, capfd):
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is no program from ids.*\Z"):
        load_target(str(path))
    assert capfd.readouterr() == ("", "")
