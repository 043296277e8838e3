"""CRT: recursive language models with early exit, reproduced, audited and corrected.

The public names are imported when they are first asked for: `crt --help` needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crt_lib.audit.causality import causality_report as causality_report
    from crt_lib.config import ModelConfig as ModelConfig, TrainConfig as TrainConfig
    from crt_lib.evaluate import evaluate as evaluate
    from crt_lib.exits.decode import generate as generate
    from crt_lib.files import InputError as InputError
    from crt_lib.model import CRT as CRT
    from crt_lib.runs.profiles import Profile as Profile, load_profile as load_profile
    from crt_lib.runs.trained import load as load
    from crt_lib.text.corpus import load_corpus as load_corpus
    from crt_lib.text.tokenizer import load_tokenizer as load_tokenizer, tokenize as tokenize
    from crt_lib.train import train as train

__version__ = "0.1.0"  # pyproject's, by `make front`: a folder that is not installed has it too

_MODULES = {
    "CRT": "model",
    "InputError": "files",
    "ModelConfig": "config",
    "Profile": "runs.profiles",
    "TrainConfig": "config",
    "audit": "audit",  # the package, which can be called
    "causality_report": "audit.causality",
    "evaluate": "evaluate",
    "generate": "exits.decode",
    "load": "runs.trained",
    "load_corpus": "text.corpus",
    "load_profile": "runs.profiles",
    "load_tokenizer": "text.tokenizer",
    "tokenize": "text.tokenizer",
    "train": "train",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Whoever imports `crt_lib.train` binds the module here; `train` is to stay the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _MODULES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
