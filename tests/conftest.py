"""What every test shares: a cache of its own, seeds, the same examples every time, its threads.

There is one torch thread, or as many as OMP_NUM_THREADS says. How near two results must be is
said in `closeness`.
"""

import contextlib
import functools
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from hypothesis import settings

from crt_lib import load_profile
from crt_lib.exits.gate import fit_gate
from crt_lib.exits.trace import make_trace
from crt_lib.runs.trained import load_data
from crt_lib.train import train

settings.register_profile("crt", deadline=None, derandomize=True, database=None)
settings.load_profile("crt")
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: children ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure():
    """A kernel of nbval whose port another program took dies at once: then another is begun."""
    with contextlib.suppress(ImportError):
        from nbval import kernel

        kernel.start_new_kernel = _thrice(kernel.start_new_kernel)


def _thrice(start):
    @functools.wraps(start)
    def starts(*args, **kwargs):
        for left in (2, 1, 0):
            try:
                return start(*args, **kwargs)
            except RuntimeError:
                if not left:
                    raise

    return starts


BRIEFLY = """
import tempfile
_folder = tempfile.TemporaryDirectory()
profile, results = "smoke", _folder.name
"""


def pytest_collection_modifyitems(items):
    """Committed notebooks that train, having a parameter of updates, do so briefly.

    At the smoke profile, for 20 updates, into a folder of their own: what nbval compares in them
    comes from stored results.
    """
    for item in items:
        cell = getattr(item, "cell", None)  # of nbval
        if cell is not None and "parameters" in cell.metadata.get("tags", ()):
            names = re.findall(r"^(\w*updates): int", cell.source, re.MULTILINE)
            if names:
                cell.source += BRIEFLY + "".join(f"{name} = 20\n" for name in names)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Subprocesses and kernels inherit it; what the user has cached is neither read nor changed."""
    before = os.environ.get("CRT_CACHE_ROOT")
    os.environ["CRT_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["CRT_CACHE_ROOT"]
    else:
        os.environ["CRT_CACHE_ROOT"] = before


@pytest.fixture(autouse=True)
def _own_seeds():
    """No test draws other numbers for those that ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def scored(tmp_path_factory):
    """A model that learned a little, in float64, with a gate; its data; a trace of valid.

    The trace is of windows of 32, its losses and scores in float32.
    """
    text = "one two three four\n\nfive six\n\n the cat sat on the mat\n\n"
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(text * 150)
    profile = load_profile("smoke").replace(corpus=str(folder), tokenizer="bpe:270")
    data = load_data(profile)
    config = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    settings = profile.train.replace(updates=12)
    model = train(config, settings, data, folder / "run", progress=False).model.eval().double()
    model.gate = fit_gate(model, data.train.ids[:600], data.tokenizer.eot_id, seq_len=32)
    return model, data, make_trace(model, data, "valid", 32, max_tokens=500)
