"""The model that `crt audit` is asked about: a run of ours, one of transformers, a function."""

import inspect
import pkgutil
import sys
from pathlib import Path
from typing import Any

from torch import nn

from crt_lib.checkpoint import load_model
from crt_lib.evaluate import Model
from crt_lib.files import InputError
from crt_lib.hf.gpt2 import load_pretrained
from crt_lib.runs.trained import find_checkpoint


def load_target(text: str, vocab_size: int | None = None) -> tuple[Model, int]:
    """The model that `text` names, and how many tokens its vocabulary has.

    `hf:<folder>`: a causal language model of transformers, safetensors only. `<module>:<name>`: a
    module or a function from ids (B, T) to logits, or what makes one when called with nothing; the
    module is looked for in the working directory too. Anything else: a run's folder or a
    checkpoint of `crt train`. `vocab_size` is needed where the model does not say it. Raises
    InputError for what cannot be loaded.
    """
    kind, _, rest = text.partition(":")
    if kind == "hf" and rest:
        model = load_pretrained(rest, local=True)
    elif rest and not Path(text).exists():
        model = _python(text)
    else:
        model = load_model(find_checkpoint(Path(text)))
    size = vocab_size or getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        raise InputError(f"{text} does not say how large its vocabulary is; give --vocab-size")
    return model, size


def _python(text: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = pkgutil.resolve_name(text)
    except Exception as error:  # anybody's module: it may fail in any way
        raise InputError(f"{text} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{text} is neither a model nor a function")
    try:
        inspect.signature(found).bind()
    except TypeError:  # it wants ids
        return found
    return found()
