"""A run as a transformers folder, a torch.export program, and a task of lm_eval."""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from closeness import OF_A_MODEL, near, roundings, same
from safetensors import SafetensorError
from tiny_models import ALL_OPTIONS, exact_model, random_ids

from crt_lib import InputError, load_profile
from crt_lib.exits.choice import CHOICES_FILE, Choice, Choices
from crt_lib.exits.decode import generate
from crt_lib.exits.policy import Policy
from crt_lib.files import read_rows, sha256
from crt_lib.hf.card import check_license
from crt_lib.hf.export import export_program, export_run
from crt_lib.hf.lm_task import write_task
from crt_lib.runs.run import run_profile
from crt_lib.runs.scores import evaluate_checkpoint
from crt_lib.runs.trained import find_checkpoint, load_trained_model

pytest.importorskip("transformers")
CASES = {"paper": {}, "all": ALL_OPTIONS}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a little text, its folder for transformers, and its corpus."""
    folder = tmp_path_factory.mktemp("export")
    corpus = folder / "text"
    corpus.mkdir()
    for i, name in enumerate(("train", "valid", "test")):
        lines = [f"the cat {i + j} saw a dog and the dog saw {j} cats \n" for j in range(120)]
        (corpus / f"{name}.txt").write_text(" \n".join(lines))
    profile = load_profile("smoke").replace(corpus=str(corpus), tokenizer="bpe:280")
    train = profile.train.replace(updates=20, eval_every=0)
    run_profile(profile.replace(train=train), folder / "run", progress=False)
    export_run(folder / "run", folder / "model")
    return folder


def test_pipeline_continues_a_text_as_we_do(run):
    from transformers import AutoTokenizer, pipeline

    import crt_lib.hf.model  # noqa: F401

    made = pipeline("text-generation", model=str(run / "model"), dtype=torch.float64)
    prompts = ["the cat saw", "a dog and the"]
    model, tokenizer, _ = load_trained_model(run / "run")
    found = made(prompts, max_new_tokens=12, do_sample=False, batch_size=2)
    for prompt, row in zip(prompts, found, strict=True):
        ids = tokenizer.encode(prompt).tolist()
        assert AutoTokenizer.from_pretrained(run / "model")(prompt)["input_ids"] == ids
        (own,) = generate(model.double(), [ids], 12, stop=tokenizer.eot_id)
        assert row[0]["generated_text"] == prompt + tokenizer.decode(own.tokens)


def test_a_folder_has_what_was_calibrated(run, tmp_path):
    path = find_checkpoint(run / "run")
    policy = Policy("similarity", 0.5, 0.4, exits=(2,))
    ways = {"full": Choice(), "similarity": Choice(policy, speedup=1.5)}
    Choices(0.01, ways).save(path.with_name(CHOICES_FILE), sha256(path.read_bytes()))
    try:
        export_run(run / "run", tmp_path / "model")
    finally:
        path.with_name(CHOICES_FILE).unlink()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 4, 5]])
    by_name, own = (model(ids, exit_policy=given).logits for given in ("auto", policy))
    assert torch.equal(by_name, own)
    assert set(model.config.calibrated) == {"full", "similarity", "auto"}


def test_lm_eval_finds_the_word_perplexity_of_crt_evaluate(run, tmp_path):
    pytest.importorskip("lm_eval")
    name = write_task(tmp_path / "task", str(run / "text"))
    stored = evaluate_checkpoint(run / "run", seq_len=64)[-1]
    words = ["--model", "hf", "--tasks", name, "--include_path", str(tmp_path / "task")]
    words += ["--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    model = f"pretrained={run / 'model'},trust_remote_code=True,max_length=64"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--model_args", model],
        capture_output=True,
        text=True,
        env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(file.read_text())["results"][name]
    bound = roundings(OF_A_MODEL)  # of a loss
    assert scores["bits_per_byte,none"] == pytest.approx(stored["bits_per_byte"], rel=bound)
    ppl = stored["word_ppl"]
    assert scores["word_perplexity,none"] == pytest.approx(ppl, rel=bound * math.log(ppl))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_exported_program_has_the_logits_of_its_exit(changes):
    model = exact_model(**changes)
    for loop in (3, None):
        program = export_program(model, loop).module()
        for shape in ((2, 16), (1, 2), (3, 64)):
            ids = random_ids(*shape)
            with torch.no_grad():
                expected = model(ids)[loop or model.config.n_loops]
                same(program(ids), expected)


def test_a_program_is_written_and_read_back(run, tmp_path):
    model, _, _ = load_trained_model(run / "run")
    ids = torch.arange(12)[None]
    path = export_run(run / "run", tmp_path / "exit.pt2", loop=2)
    program = torch.export.load(path).module()
    near(program(ids), model(ids, [2])[2], OF_A_MODEL)


@pytest.mark.parametrize("name", ["no such <script>", "", "MIT", "mit\n", "a" * 99])
def test_what_is_no_licence_is_refused_before_anything_is_written(run, tmp_path, name):
    with pytest.raises(InputError, match="is no name that the hub has"):
        export_run(run / "run", tmp_path / "named", license=name)
    assert not (tmp_path / "named").exists()


@pytest.mark.parametrize(
    "name", ["mit", "apache-2.0", "cc-by-nc-sa-4.0", "llama3.1", "lppl-1.3c", "openrail++"]
)
def test_names_of_the_hub_are_licences(name):
    check_license(name)


def test_a_folder_has_a_card_that_the_hub_reads(run, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    out = export_run(run / "run", tmp_path / "named", license="mit")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation"
    stored = {
        row["exit"]: row["word_ppl"]
        for row in read_rows(run / "run" / "results.csv")
        if (row["split"], row["protocol"]) == ("test", "honest")
    }
    told = {r.metric_name: r.metric_value for r in card.data.eval_results}
    for loop, ppl in stored.items():
        assert told[f"word perplexity, exit {loop}"] == ppl
    shutil.copy(find_checkpoint(run / "run"), tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    for other in ("other.safetensors", run / "run/checkpoints/last.safetensors"):
        out = export_run(other, tmp_path / "other")  # whose scores nobody knows
        assert ModelCard.load(out / "README.md").data.eval_results is None
    assert str(run) not in (out / "README.md").read_text()  # nobody's folders are published
    assert "# named" in card.text and "after loop 1, 2, 3, 4; " in card.text


@pytest.fixture
def hub(monkeypatch):
    """What would have been uploaded: a repository's name, its options and its files' texts."""
    import huggingface_hub

    sent = []

    def create(self, repo_id, **options):
        return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}", **options)

    def upload(self, repo_id, folder_path, allow_patterns, ignore_patterns, **options):
        paths = (path for path in folder_path.rglob("*") if path.is_file())
        names = [path.relative_to(folder_path).as_posix() for path in paths]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        kept = huggingface_hub.utils.filter_repo_objects(names, **patterns)
        files = {name: (folder_path / name).read_bytes() for name in kept}
        sent.append((repo_id, options, files))
        return "committed"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return sent


def test_a_model_goes_to_the_hub_with_its_code_and_its_card(run, tmp_path, hub):
    from huggingface_hub import ModelCard

    from crt_lib.hf.model import CRTForCausalLM

    CRTForCausalLM.from_crt(exact_model()).push_to_hub("me/new", commit_message="first", tags=["x"])
    model = CRTForCausalLM.from_pretrained(run / "model")
    assert model.push_to_hub("me/loaded") == "committed"
    out = tmp_path / "saved"
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "state.json").write_text("{}")
    model.save_pretrained(out, push_to_hub=True, private=True)
    names, options, files = zip(*hub, strict=True)
    assert names == ("me/new", "me/loaded", "me/saved")
    assert options[0] == {"commit_message": "first"} and not options[1]
    for found in files:
        assert {"README.md", "config.json", "model.safetensors", "modeling_crt.py"} <= set(found)
        assert not any("/" in name for name in found)
    exported = (run / "model" / "README.md").read_bytes()
    assert files[1]["README.md"] == files[2]["README.md"] == exported
    new = ModelCard(files[0]["README.md"].decode())
    assert {"x", "custom_code"} <= set(new.data.tags) and "after loop 1, 3, 4" in new.text
    assert ModelCard(exported.decode()).data.base_tokenizer == "bpe:280"


def test_without_the_hub_the_way_out_is_said(monkeypatch):
    from crt_lib.hf.model import CRTForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf upload me/new FOLDER"):
        CRTForCausalLM.from_crt(exact_model()).push_to_hub("me/new")


def test_a_full_disk_is_one_line(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("crt_lib.hf.model.CRTForCausalLM.save_pretrained", full)
    with pytest.raises(InputError, match="No space left"):
        export_run(run / "run", tmp_path / "hf")


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    for loop in (0, 9):
        with pytest.raises(InputError, match="no head"):
            export_run(run / "run", tmp_path / "exit.pt2", loop=loop)
    if not find_spec("onnxscript"):
        with pytest.raises(InputError, match="pip install"):
            export_run(run / "run", tmp_path / "model.onnx")
        assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(InputError, match="pt2"):
        export_run(run / "run", tmp_path / "folder", loop=2)
    with pytest.raises(InputError, match="no checkpoint"):
        export_run(tmp_path, tmp_path / "folder")
    with pytest.raises(InputError, match="unknown corpus"):
        write_task(tmp_path / "task", "nothing")
    assert not list(tmp_path.iterdir())


def test_our_own_export_is_a_model_to_audit(run):
    done = subprocess.run(
        [sys.executable, "-m", "crt_lib.cli", "audit", f"hf:{run / 'model'}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | OFFLINE,
    )
    assert done.returncode == 0 and "verdict: causal" in done.stdout, done.stderr
