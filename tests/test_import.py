"""A bare machine: torch, numpy, tokenizers and safetensors are enough to import."""

import subprocess
import sys

BARE = """
import sys
for name in ("accelerate", "tqdm", "typer", "datasets", "transformers", "papermill", "pandas",
             "matplotlib", "seaborn", "ipywidgets", "huggingface_hub", "psutil"):
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


def test_imports_without_the_extras_and_says_what_training_needs(tmp_path):
    command = [sys.executable, "-c", BARE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install accelerate" in done.stdout
    assert not (tmp_path / "run").exists()
