"""The model that `crt audit` is asked about: a run, one of transformers, a function, weights."""

import contextlib
import inspect
import json
import logging
import pkgutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from crt_lib.audit.asking import refuse, vocabulary_of
from crt_lib.checkpoint import load_model
from crt_lib.evaluate import Model
from crt_lib.files import InputError
from crt_lib.hf.gpt2 import cannot_be_had, load_pretrained, transformers
from crt_lib.runs.trained import find_checkpoint

MOST = 2**24  # bytes of a configuration
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_WITHIN = ("state_dict", "model_state_dict", "model")  # where trainings keep weights in a file


def load_target(
    text: str, vocab_size: int | None = None, made_by: str | None = None
) -> tuple[Model, int]:
    """The model that `text` names, and how many tokens its vocabulary has.

    `hf:<folder or id>`: a causal language model of transformers, safetensors only. A file ending in
    .pt2: a program of torch.export; in .onnx: one of ONNX, with onnxruntime. `<module>:<name>`: a
    module or a function from ids (B, T) to logits, or what makes one when called with nothing; the
    module is looked for in the working directory too. Anything else: a run's folder or a
    checkpoint of `crt train`. With `made_by`, a `<module>:<name>` that makes a model when called
    with nothing, `text` is a file of its weights: a state_dict in safetensors, or one that torch
    saved, of which nothing is unpickled. `vocab_size`: None to ask the model.

    Raises InputError for what cannot be loaded, and for encoder-decoders and models of both sides,
    of which nobody asks that they see no later token.
    """
    kind, _, rest = text.partition(":")
    if made_by is not None:
        model: Model = _with_weights(_python(made_by), Path(text))
    elif text.endswith(_PICKLED):
        raise InputError(f"{text} holds weights; name what makes their model: --class module:Class")
    elif kind == "hf" and rest:
        refuse(_configuration(rest))
        model = load_pretrained(rest, local=Path(rest).is_dir())
    elif text.endswith(".pt2"):
        model = _program(Path(text))
    elif text.endswith(".onnx"):
        model = _onnx(Path(text))
    elif rest and not Path(text).exists():
        model = _python(text)
    else:
        model = load_model(find_checkpoint(Path(text)))
    refuse(getattr(model, "config", None), type(model).__name__)
    return model, vocab_size or vocabulary_of(model)


def _configuration(name: str) -> Any:
    """What says of which kind a model is, before it is loaded; None where nothing does."""
    path = Path(name) / "config.json"
    try:
        if path.is_file() and path.stat().st_size > MOST:
            raise InputError(f"{path} has more than {MOST:,} bytes; a configuration has not")
        if path.is_file():
            return SimpleNamespace(**json.loads(path.read_text(encoding="utf-8")))
        return None if Path(name).is_dir() else transformers().AutoConfig.from_pretrained(name)
    except InputError:
        raise
    except OSError as error:
        raise cannot_be_had(name, error) from error
    except (ValueError, KeyError, TypeError):
        return None  # loading it says why


def _python(text: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with _named(f"{text} cannot be imported"):
            found = pkgutil.resolve_name(text)
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
    with _named(f"{text} cannot be called"):
        return found()


def _with_weights(model: Any, path: Path) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(f"--class makes a {type(model).__name__}, not a torch.nn.Module")
    _check_there(path)
    why = "and nothing else is unpickled; write one with torch.save(model.state_dict(), path)"
    with _named(f"{path} is no state_dict of tensors alone, {why}", told=False):
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = next((weights[name] for name in _WITHIN if name in weights), weights)
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        consume_prefix_in_state_dict_if_present(weights, prefix)
    with _named(f"{path} does not fit the class"):
        model.load_state_dict(weights)
    return model.eval()


class _Shaped:
    """A program, asked for fewer tokens than it is fixed to by filling up with token 0.

    `shape` (rows, positions): None where any number will do.
    """

    def __init__(self, run: Callable[[Tensor], Any], shape: list[int | None], most: int | None):
        self.run, self.rows, self.positions = run, *shape
        self.config = SimpleNamespace(max_seq_len=self.positions or most)

    def __call__(self, ids: Tensor) -> Any:
        B, T = ids.shape
        rows, positions = self.rows or B, self.positions or T
        if rows < B or positions < T:
            raise ValueError(f"it takes {rows} rows of {positions} tokens, not {B} of {T}")
        return self.run(F.pad(ids, (0, positions - T, 0, rows - B)))[:B, :T]


def _program(path: Path) -> Model:
    _check_there(path)
    _check_packed(path)
    logger = logging.getLogger("torch.export")
    was, logger.disabled = logger.disabled, True  # it logs a traceback; the error is one line
    try:
        with _named(f"{path} is no program from ids"):
            program = torch.export.load(path)
            (name,) = program.graph_signature.user_inputs
            node = next(node for node in program.graph.nodes if node.name == name)
            dims = list(node.meta["val"].shape)
            symbol = getattr(getattr(dims[1], "node", None), "expr", None)
            most = getattr(program.range_constraints.get(symbol), "upper", None)
            module = program.module()
    finally:
        logger.disabled = was
    shape = [dim if isinstance(dim, int) else None for dim in dims]
    return _Shaped(module, shape, int(most) if most is not None and str(most).isdigit() else None)


def _check_packed(path: Path) -> None:
    """Raise InputError for a zip that holds more than its own size: none that torch writes does."""
    if not zipfile.is_zipfile(path):
        return  # torch says what it is
    with _named(f"{path} is no program from ids"), zipfile.ZipFile(path) as file:
        parts = file.infolist()
    size, inside = path.stat().st_size, sum(part.file_size for part in parts)
    if inside > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise InputError(
            f"{path} has {size:,} bytes and unpacks to {inside:,}; torch.export packs nothing, so "
            "it is none of its programs"
        )


def _onnx(path: Path) -> Model:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{path} needs onnxruntime; pip install 'crt-lm[onnx]'") from error
    _check_there(path)
    with _named(f"{path} is no ONNX model"):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = {given.name: given for given in session.get_inputs()}
        first = inputs.get("input_ids") or next(iter(inputs.values()))
        shape = [dim if isinstance(dim, int) else None for dim in first.shape]
        outputs = session.get_outputs()
        logits = next((out.name for out in outputs if out.name == "logits"), outputs[0].name)

    def run(ids: Tensor) -> Tensor:
        given = {
            first.name: ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        }
        feed = {
            name: given[name].numpy().astype("int32" if "int32" in one.type else "int64")
            for name, one in inputs.items()
        }
        return torch.from_numpy(session.run([logits], feed)[0])

    return _Shaped(run, shape, None)


@contextlib.contextmanager
def _named(what: str, told: bool = True) -> Iterator[None]:
    """Any error of anybody's module or file as an InputError of one line: `what`, and why."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may exit when it is imported
        why = f": {' '.join(str(error).split())}" if told else ""
        raise InputError(f"{what}: {type(error).__name__}{why}") from error


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is not there")
