"""CRT: recursive language models with early exit, reproduced, audited and corrected."""

from crt_lib.causality import causality_report
from crt_lib.config import ModelConfig, TrainConfig
from crt_lib.corpus import load_corpus
from crt_lib.decode import generate
from crt_lib.evaluate import evaluate
from crt_lib.files import InputError
from crt_lib.model import CRT
from crt_lib.profiles import Profile, load_profile
from crt_lib.tokenizer import load_tokenizer, tokenize
from crt_lib.train import train

__version__ = "0.1.0"

__all__ = [
    "CRT",
    "InputError",
    "ModelConfig",
    "Profile",
    "TrainConfig",
    "causality_report",
    "evaluate",
    "generate",
    "load_corpus",
    "load_profile",
    "load_tokenizer",
    "tokenize",
    "train",
]
