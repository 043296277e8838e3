"""The command line: one clear error for bad input, nothing written; the whole path for good."""

import json
import os
import shutil

import pytest
import torch
from closeness import OF_A_MODEL, roundings

from crt_lib import cli
from crt_lib.audit.checks import Check
from crt_lib.files import read_rows


def main(*words: str) -> int:
    """The exit code of `crt words...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["crt", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return stopped.value.code or 0


def crt(*words: str, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `crt words...`."""
    code = main(*words)
    return code, *capsys.readouterr()


BAD = {
    "corpus": (["--corpus", "wikitext-9"], "wikitext-9", "docstrings"),
    "no corpus": (["--corpus", ""], "''", "docstrings"),
    "corpus with a long name": (["--corpus", "x" * 5000], "xxx", "docstrings"),
    "no recipe": (["--recipe", ""], "''", "crt2"),
    "profile": (["--profile", "huge"], "'huge'", "smoke, quick, small, paper"),
    "tokenizer": (["--tokenizer", "bpe:3"], "'bpe:3'", "257"),
    "sequence": (["--set", "train.seq_len=4096"], "4096", "max_seq_len"),
    "type": (["--set", "model.n_loops=many"], "'many'", "int"),
    "field": (["--set", "model.depth=3"], "'depth'", "n_loops"),
    "part": (["--set", "depth=3"], "depth=3", "model.<field>"),
    "precision": (["--precision", "fp8"], "'fp8'", "'bf16'"),
    "precision and optimizer": (["--precision", "fp16"], "fp16", "use fp32 or bf16"),
    "dry run": (["--dry-run", "--set", "train.batch_size=100000"], "100000", "smaller batch"),
    "dry run, heads": (["--dry-run", "--set", "model.n_heads=7"], "n_heads 7", "divisor"),
}


@pytest.mark.parametrize("words, value, advice", BAD.values(), ids=BAD)
def test_bad_input_of_train(words, value, advice, tmp_path, capsys):
    profile = [] if "--profile" in words else ["--profile", "smoke"]
    code, _, err = crt(
        "train", *profile, "--quiet", "--out", str(tmp_path / "run"), *words, capsys=capsys
    )
    assert code == 2
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert value in err and advice in err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_predicts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = crt(
        "train", "--profile", "smoke", "--precision", "fp32", "--dry-run", capsys=capsys
    )
    assert code == 0 and not list(tmp_path.iterdir())
    assert "30 updates of 512 positions, in fp32" in out and "peak memory:" in out


FOLDERS = {
    "without a split": ({"train.txt": b"a b c\n", "valid.txt": b"a b\n"}, "test.txt"),
    "tiny": ({n: b"a b a\n" for n in ("train.txt", "valid.txt", "test.txt")}, "too few"),
}


@pytest.mark.parametrize("files, message", FOLDERS.values(), ids=FOLDERS)
def test_bad_folders(files, message, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in files.items():
        (corpus / name).write_bytes(content)
    words = ["--profile", "smoke", "--quiet", "--corpus", str(corpus)]
    code, _, err = crt("train", *words, "--out", str(tmp_path / "run"), capsys=capsys)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_corpus_of_the_hub_without_network(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CRT_DATA_ROOT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    words = ["--profile", "small", "--quiet", "--out", str(tmp_path / "run")]
    code, _, err = crt("train", *words, capsys=capsys)
    assert code == 2 and "CRT_DATA_ROOT" in err and "docstrings" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the smoke profile, trained through the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    words = ["train", "--profile", "smoke", "--quiet", "--out", str(out)]
    words += ["--set", "train.updates=4", "--set", "train.eval_every=0"]
    assert main(*words) == 0
    return out


def test_train_leaves_results_and_a_manifest(trained):
    rows = read_rows(trained / "results.csv")
    kinds = {(row["split"], row["protocol"]) for row in rows}
    assert kinds == {
        *((split, protocol) for split in ("valid", "test") for protocol in ("honest", "released")),
        ("valid", "deployable"),
    }
    assert len(rows) == len(kinds) * 4
    part = json.loads((trained / "manifest.json").read_text())["train"]
    assert part["status"] == "done" and part["seconds"] > 0 and part["peak_memory_bytes"] > 1e6
    assert part["data"]["splits"]["test"]["tokens"] == rows[8]["tokens"] == 7461
    assert part["environment"]["versions"]["torch"]


def test_evaluate_repeats_the_results(trained, capsys):
    code, out, _ = crt("evaluate", str(trained), "--split", "test", "--json", capsys=capsys)
    assert code == 0
    stored = [r for r in read_rows(trained / "results.csv") if r["split"] == "test"]
    for line, row in zip(out.splitlines(), stored[:4], strict=True):
        bound = roundings(OF_A_MODEL)
        assert json.loads(line)["loss"] == pytest.approx(row["loss"], rel=bound)


def test_distil_goes_on_from_a_run(trained, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["distil", str(trained), "--out", out, "--quiet", "--set"]
    code, table, _ = crt(*words, "train.updates=2", capsys=capsys)
    assert code == 0 and "word_ppl" in table
    code, _, err = crt(*words, "model.n_loops=2", capsys=capsys)
    assert code == 2 and err == "error: --set model.n_loops=2: write train.<field>=<value>\n"


def test_average_of_kept_checkpoints_is_evaluated_as_another(trained, tmp_path, capsys):
    code, _, err = crt("average", str(trained), capsys=capsys)
    assert code == 2 and "kept 0 checkpoints" in err and "keep_every" in err
    words = ["--profile", "smoke", "--quiet", "--out", str(tmp_path / "run")]
    words += [f"--set=train.{x}" for x in ("updates=4", "eval_every=0", "keep_every=2")]
    assert crt("train", *words, capsys=capsys)[0] == 0
    code, out, _ = crt("average", str(tmp_path / "run"), "--last", "2", capsys=capsys)
    file = tmp_path / "run" / "checkpoints" / "average.safetensors"
    assert code == 0 and str(file) in out
    table = tmp_path / "average.csv"
    words = ["evaluate", str(file), "--json", "--out", str(table)]
    code, out, _ = crt(*words, capsys=capsys)
    assert [row["loss"] for row in read_rows(table)] == [
        json.loads(line)["loss"] for line in out.splitlines()
    ]
    last = [r["loss"] for r in read_rows(tmp_path / "run" / "results.csv") if r["split"] == "test"]
    assert code == 0 and json.loads(out.splitlines()[0])["loss"] != last[0]


def test_evaluate_refuses_another_tokenizer(trained, capsys):
    code, _, err = crt("evaluate", str(trained), "--tokenizer", "bpe:300", capsys=capsys)
    assert code == 2 and "fingerprint" in err


def test_generate_needs_no_corpus_once_a_bpe_is_trained(tmp_path, capsys):
    corpus = tmp_path / "text"
    corpus.mkdir()
    for name in ("train", "valid", "test"):
        (corpus / f"{name}.txt").write_text("the cat saw a dog and the dog saw a cat\n" * 200)
    out = tmp_path / "run"
    words = ["--profile", "smoke", "--quiet", "--corpus", str(corpus), "--tokenizer", "bpe:280"]
    words += ["--set", "train.updates=2", "--set", "train.eval_every=0"]
    assert crt("train", *words, "--out", str(out), capsys=capsys)[0] == 0
    shutil.rmtree(corpus)
    code, text, _ = crt("generate", str(out), "the dog", "--tokens", "3", capsys=capsys)
    assert code == 0 and text.startswith("the dog")

    file = out / "checkpoints" / "tokenizer.json"
    file.write_text(file.read_text()[:-9])
    code, _, err = crt("generate", str(out), "the dog", capsys=capsys)
    assert code == 2 and "tokenizer.json is not a tokenizer" in err


@pytest.fixture
def float64():
    """Models that are read from files compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_generate_is_the_same_with_speculation_and_by_seed(trained, float64, capsys):
    words = ["generate", str(trained), "the", "a", "--tokens", "12", "--json"]

    def texts(*more):
        code, out, _ = crt(*words, *more, capsys=capsys)
        assert code == 0
        return [json.loads(line) for line in out.splitlines()]

    plain = texts()
    assert [len(row["loops"]) for row in plain] == [12, 12]
    assert texts("--speculate", "1") == texts("--speculate", "text") == plain
    by_exit = texts("--exit", "2")
    assert {loop for row in by_exit for loop in row["loops"]} == {2}
    assert texts("--exit", "2", "--speculate", "text") == by_exit
    drawn = ["--temperature", "1", "--seed", "5"]
    assert texts(*drawn) == texts(*drawn) != plain
    assert "12 tokens, 4.00 loops each" in crt(*words[:-1], capsys=capsys)[1]


def test_generate_leaves_out_what_is_never_to_be_written(trained, capsys):
    words = ["generate", str(trained), "a", "--tokens", "40", "--temperature", "2", "--json"]
    _, out, _ = crt(*words, capsys=capsys)
    written = json.loads(out)["text"].split()[0]
    _, out, _ = crt(*words, "--never", written, capsys=capsys)
    assert written not in json.loads(out)["text"].split()


def test_generate_takes_what_was_calibrated(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    code, out, _ = crt("calibrate", str(run), "--budget", "50", capsys=capsys)
    assert code == 0 and "crt generate takes" in out
    table = tmp_path / "there.csv"
    code, out, _ = crt(
        "calibrate", str(run), "--elsewhere", "grammar", "--out", str(table), capsys=capsys
    )
    assert code == 0 and len(read_rows(table)) == len(out.splitlines()) > 0
    for asked, says in ((run, "--elsewhere"), (trained, "keeps no promise")):
        more = ["--out", str(table)] if asked == run else ["--elsewhere", "grammar"]
        code, _, err = crt("calibrate", str(asked), *more, capsys=capsys)
        assert code == 2 and says in err
    words = ["generate", str(run), "the", "--tokens", "4"]
    code, _, err = crt(*words, capsys=capsys)
    assert code == 0 and "--exit full runs every loop" in err and len(err.splitlines()) == 1
    for asked in (["--exit", "1"], ["--exit", "full"], ["--budget", "50"], ["--speculate", "auto"]):
        assert crt(*words, *asked, capsys=capsys)[0] == 0
    path = run / "checkpoints" / "exits.json"
    about = json.loads(path.read_text())
    about["ways"]["speculation from the text"]["speedup"] = 9.0
    path.write_text(json.dumps(about))
    assert "speculation from the text" in crt(*words, capsys=capsys)[2]
    for others in (["a"], ["--temperature", "1"]):  # drafts were timed on one greedy text
        assert "speculation" not in crt(*words, *others, capsys=capsys)[2]
    about["ways"]["exit 1, speculation from the text"] |= {"speedup": 8.0}
    path.write_text(json.dumps(about))
    for asked in (["--exit", "1"], ["--budget", "50"], ["--exit", "1", "--budget", "50"]):
        assert crt(*words, "--speculate", "auto", *asked, capsys=capsys)[0] == 0
    code, _, err = crt(*words, "--speculate", "text", "--budget", "0", capsys=capsys)
    assert code == 2 and "crt calibrate RUN --budget 0" in err
    code, _, err = crt(*words, "--budget", "1", capsys=capsys)
    assert code == 2 and "crt calibrate RUN --budget 1" in err


GENERATE = {
    "empty": (["", "--tokens", "3"], "a prompt is empty"),
    "criterion": (["--exit", "patience"], "'patience'"),
    "threshold": (["--exit", "margin", "--tau0", "1.5"], "tau0 is 1.5"),
    "thresholds": (["--exit", "margin", "--tau0", "0.1"], "only falls"),
    "both": (["--exit", "1", "--speculate", "1"], "cannot be the last where loop 1 drafts"),
    "8 bits": (["--quantize", "int8", "--speculate", "1"], "leave out thresholds and --quantize"),
    "draft": (["--speculate", "4"], "loop 4 cannot draft"),
    "exit": (["--exit", "9"], "loop 9"),
    "length": (["--tokens", "500"], "from 0 to 128"),
}


@pytest.mark.parametrize("words, message", GENERATE.values(), ids=GENERATE)
def test_bad_input_of_generate(words, message, trained, capsys):
    code, _, err = crt("generate", str(trained), "the", *words, capsys=capsys)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_bench_of_trained_models(trained, tmp_path, capsys):
    table, other = tmp_path / "assisted.csv", tmp_path / "other"
    few, asked = ["--texts", "2", "--tokens", "4"], ["--assistant", str(trained)]
    words = ["train", "--profile", "smoke", "--quiet", "--out", str(other)]
    assert main(*words, "--set", "train.updates=1", "--set", "train.eval_every=0") == 0
    words = ["bench", "assisted", str(trained), str(other), *asked, *few, "--out", str(table)]
    assert crt(*words, capsys=capsys)[0] == 0
    rows = read_rows(table)
    assert {row["run"] for row in rows if row["way"] == "generate"} == {str(trained), str(other)}
    drafted = {row["run"] for row in rows if row["way"] == "a smaller model drafts"}
    assert drafted == {str(other)}  # no run drafts for itself
    words = ["bench", "assisted", "results/demo", *asked, *few]
    code, _, err = crt(*words, capsys=capsys)
    assert code == 2 and f"the tokens of {trained} are not those of results/demo" in err
    words = ["bench", "decode", str(trained), "--only", "exit", "--batch-size", "2"]
    assert crt(*words, *few, "--out", str(table), capsys=capsys)[0] == 0
    assert "exit 1" in {row["way"] for row in read_rows(table)}
    code, _, err = crt(*words, "--texts", "3", capsys=capsys)
    assert code == 2 and "3 texts are not whole batches of 2" in err
    code, _, err = crt(*words, "--texts", "2", "--tokens", "500", capsys=capsys)
    assert code == 2 and "500 new tokens: with a prompt, at most 127 fit" in err


def test_audit_has_an_exit_code(trained, tmp_path, capsys):
    page = tmp_path / "report.html"
    code, out, _ = crt("audit", str(trained), "--html", str(page), capsys=capsys)
    assert code == 0 and "verdict: causal" in out and "claimed" in out
    assert "ok: no loss below the entropy of grammar at exit 4" in out
    assert "<svg" in page.read_text()
    leaking = ["--set", "model.causal=false", "--set", "train.updates=1"]
    words = ["train", "--profile", "smoke", "--quiet", "--out", str(tmp_path / "leaks"), *leaking]
    assert crt(*words, capsys=capsys)[0] == 0
    code, out, _ = crt("audit", str(tmp_path / "leaks"), capsys=capsys)
    assert code == 1 and "sees the future" in out
    code, out, _ = crt("audit", str(tmp_path / "leaks"), "--json", capsys=capsys)
    report = json.loads(out)
    assert code == report["status"] == 1 and "tokens" in report["convicting"]
    assert report["model"] == str(tmp_path / "leaks")
    assert [check["passed"] for check in report["checks"]] == [True] * 4  # it has not learned to


def test_an_audited_run_that_scores_below_its_texts_entropy_leaks(
    trained, tmp_path, monkeypatch, capsys
):
    low = Check("no loss below the entropy", False, "as planted here")
    monkeypatch.setattr("crt_lib.audit.checks.entropy_check", lambda *given: [low])
    page = tmp_path / "report.html"
    words = ["audit", str(trained), "--only-causality", "--html", str(page)]
    code, out, _ = crt(*words, capsys=capsys)
    assert code == 1 and "verdict: causal" in out and "FAILS: no loss below the entropy" in out
    assert '<p class="verdict leak">FAILS: no loss below' in page.read_text()


def test_audit_of_somebody_elses_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "def sound(ids):\n    return torch.nn.functional.one_hot(ids, 9).float()\n"
        "def peeks(ids):\n    return sound(ids.roll(-1, 1))\n"
        "def breaks(ids):\n    raise ValueError('no such day')\n"
        "def talks(ids):\n    print('asked')\n    return sound(ids)\n"
        "def wide(ids):\n    return torch.nn.functional.one_hot(ids[:, :3], 9).float()\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, expected in (("sound", 0), ("peeks", 1)):
        code, out, _ = crt("audit", f"theirs:{name}", capsys=capsys)
        assert code == expected and "not asked" in out and "measured" not in out
    code, out, err = crt("audit", "theirs:talks", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["status"] == 0 and "asked" in err
    code, _, err = crt("audit", "theirs:breaks", "--vocab-size", "9", capsys=capsys)
    assert code == 2 and "no such day" in err and len(err.splitlines()) == 1
    code, _, err = crt("audit", "theirs:wide", capsys=capsys)
    assert code == 2 and "not (B, T, V)" in err
    code, _, err = crt("audit", "theirs:breaks", capsys=capsys)
    assert code == 2 and "--vocab-size" in err
    code, _, err = crt("audit", "theirs:peeks", "--html", str(tmp_path), capsys=capsys)
    assert code == 2 and "is not a regular file" in err
    code, _, err = crt("audit", "nowhere", capsys=capsys)
    assert code == 2 and "no checkpoint" in err


def test_damaged_and_missing_checkpoints(trained, tmp_path, capsys):
    code, _, err = crt("evaluate", str(tmp_path), capsys=capsys)
    assert code == 2 and "no checkpoint" in err
    whole = (trained / "checkpoints" / "best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    code, _, err = crt("audit", str(tmp_path / "cut.safetensors"), capsys=capsys)
    assert code == 2 and "truncated" in err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--profile", "smoke", "--quiet", "--out", str(tmp_path / "file" / "run")]
    code, _, err = crt("train", *words, capsys=capsys)
    assert code == 2 and "Not a directory" in err and os.listdir(tmp_path) == ["file"]
