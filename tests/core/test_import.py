"""torch, numpy, tokenizers and safetensors are enough to import; for help none of them is."""

import json
import subprocess
import sys

import pytest
from typer.main import get_command

import crt_lib
from crt_lib.cli import app

BARE = """
import sys
for name in ("accelerate", "tqdm", "typer", "datasets", "transformers", "papermill", "pandas",
             "matplotlib", "ipywidgets", "huggingface_hub", "psutil"):
    sys.modules[name] = None  # importing it raises ImportError
import crt_lib
from crt_lib import InputError
profile = crt_lib.load_profile("smoke")
corpus = crt_lib.load_corpus("grammar")
data = crt_lib.tokenize(corpus, crt_lib.load_tokenizer("word", corpus))
config = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
assert not crt_lib.causality_report(crt_lib.CRT(config), config.vocab_size, length=4).leaks
try:
    crt_lib.train(config, profile.train, data, sys.argv[1])
except InputError as error:
    print(error)
"""
HEAVY = {"torch", "numpy", "pandas", "transformers", "accelerate", "tokenizers", "safetensors"}
HEAVY |= {"pydantic", "rich"}  # typer's own
RUN = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
    try:
        from crt_lib.cli import main
        main()
    except SystemExit as stopped:
        code = stopped.code
print(json.dumps([code, out.getvalue(), sorted(sys.modules)]))
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def every_command(command=None, words=()) -> list[tuple[str, ...]]:
    command = command or get_command(app)
    found = [words]
    for name, one in getattr(command, "commands", {}).items():
        found += every_command(one, (*words, name))
    return found


def test_imports_without_the_extras_and_says_what_training_needs(tmp_path):
    assert "pip install accelerate" in python(BARE, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_loads_nothing_that_takes_time(words):
    code, said, loaded = json.loads(python(RUN, *words, "--help"))
    assert code == 0 and "Usage" in said
    assert not HEAVY.intersection(loaded)


@pytest.mark.parametrize(
    "words, told",
    [
        ("train --profile huge", "'huge'"),
        ("train --set model.depth=3", "'depth'"),
        ("bench train --set n_heads=7", "n_heads 7"),
        ("bench step --recipe none", "'none'"),
        ("reproduce --profile huge", "'huge'"),
        ("reproduce --only nothing", "'nothing'"),
        ("sweep 01 --grid seed --out nowhere", "'seed'"),
        ("claims --results nowhere", "nowhere"),
    ],
)
def test_bad_settings_are_told_before_torch_is_loaded(words, told):
    code, said, loaded = json.loads(python(RUN, *words.split()))
    assert code == 2 and told in said
    assert said.lower().count("error: ") == 1 and "Traceback" not in said
    assert "torch" not in loaded


def test_public_names_come_when_they_are_asked_for():
    code = "import sys, crt_lib; print(dir(crt_lib), 'torch' in sys.modules, sep='\\n')"
    listed, loaded = python(code).splitlines()
    assert loaded == "False" and all(f"'{name}'" in listed for name in crt_lib.__all__)
    names = [getattr(crt_lib, name) for name in crt_lib.__all__]
    called = [value.__name__.removeprefix("crt_lib.") for value in names]
    assert called == crt_lib.__all__
    assert set(crt_lib._MODULES) == set(crt_lib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        crt_lib.trian  # noqa: B018


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_function_stays_one_when_its_module_of_the_same_name_is_imported(name):
    code = f"import crt_lib.{name}, crt_lib; from crt_lib import {name}; print({name}.__qualname__)"
    assert python(code).strip() == name
    module = sys.modules[f"crt_lib.{name}"]
    assert getattr(crt_lib, name) is getattr(module, name)
