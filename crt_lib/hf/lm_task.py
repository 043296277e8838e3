"""A corpus as a task of lm_eval, which then scores any model on it as `crt evaluate` does."""

import json
import re
from pathlib import Path
from string import Template

from crt_lib.files import write_text
from crt_lib.text.corpus import load_corpus

_SCORES = '''\
"""Totals of a document's nats over its own counts: white-space words and line ends, and bytes."""


def per_word_and_byte(doc, results):
    (loglikelihood,) = results
    return {
        "word_perplexity": (loglikelihood, doc["words"]),
        "byte_perplexity": (loglikelihood, doc["bytes"]),
        "bits_per_byte": (loglikelihood, doc["bytes"]),
    }
'''


def write_task(folder: str | Path, corpus: str, split: str = "test") -> str:
    """Write a corpus's split, text included, as a task to `folder`; its name, for `lm_eval`.

    The split is one document, so that with `max_length` as the honest protocol's window the
    harness scores what `crt evaluate` does. Raises InputError as `load_corpus`.
    """
    loaded = load_corpus(corpus)
    part = loaded.split(split)
    name = re.sub(r"[^\w-]+", "_", f"crt_{Path(loaded.name).name}_{split}")
    folder = Path(folder).absolute()
    file = folder / f"{name}.jsonl"
    row = {"text": part.text, "words": part.n_words, "bytes": part.n_bytes}
    write_text(file, json.dumps(row) + "\n")
    task = Template(Path(__file__).with_name("lm_task.yaml").read_text(encoding="utf-8"))
    write_text(folder / f"{name}.yaml", task.substitute(name=name, file=json.dumps(str(file))))
    write_text(folder / "crt_scores.py", _SCORES)
    return name
