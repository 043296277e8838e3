"""A model for other programs: a folder of transformers, a program of torch.export or ONNX."""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from crt_lib.exits.choice import choices_of
from crt_lib.files import InputError, atomic_path
from crt_lib.hf.card import check_license, write_card
from crt_lib.hf.gpt2 import transformers
from crt_lib.model import CRT
from crt_lib.runs.trained import (
    TOKENIZER_FILE,
    as_crt,
    find_checkpoint,
    load_trained_model,
    scores_of,
)
from crt_lib.text.tokenizer import END_OF_TEXT, ByteLevelBPE


class FixedExit(nn.Module):
    """Ids (B, T) to the logits (B, T, V) of one exit: a forward pass without checks or choices."""

    def __init__(self, model: CRT, loop: int):
        super().__init__()
        self.model, self.loop = model, loop

    def forward(self, ids: Tensor) -> Tensor:
        states = dict(self.model.hidden_states(ids, self.loop))
        return F.linear(*self.model.readout(self.loop, states[self.loop]))


def export_program(model: CRT, loop: int | None = None) -> torch.export.ExportedProgram:
    """torch.export of the forward pass up to exit `loop` (None: the last), any B and T.

    Raises InputError for a loop without a head.
    """
    last, known = model.config.n_loops if loop is None else loop, model.config.head_loops
    if last not in known:
        raise InputError(f"loop {loop} has no head; loops with one are {known}")
    fixed = FixedExit(model, last).eval()
    tokens = min(16, model.config.max_seq_len)
    ids = torch.zeros(2, tokens, dtype=torch.int64, device=model.loop_encoding.device)
    rows = torch.export.Dim("rows", min=1)
    positions = torch.export.Dim("positions", min=2, max=model.config.max_seq_len)
    with torch.no_grad():
        return torch.export.export(fixed, (ids,), dynamic_shapes=({0: rows, 1: positions},))


def export_run(
    checkpoint: str | Path, out: str | Path, loop: int | None = None, license: str | None = None
) -> Path:
    """Write a run's model to `out`: a program if that ends in .pt2 or .onnx, else a folder.

    The folder is for transformers. `loop`: the exit of the program; `license`: for the folder's
    card. Raises InputError for what is no licence, for a folder with a model without a BPE, for
    `loop` with a folder (its `exit_policy` chooses), and as `load_trained_model`.
    """
    check_license(license)
    path, out = find_checkpoint(checkpoint), Path(out)
    loaded, tokenizer, trained = load_trained_model(path)
    model = as_crt(loaded, path)
    if out.suffix in (".pt2", ".onnx"):
        return _write_program(export_program(model.cpu(), loop), out)
    if loop is not None:
        raise InputError("an exit is fixed in a program: write to a file ending in .pt2 or .onnx")
    if not isinstance(tokenizer, ByteLevelBPE):
        raise InputError(f"transformers has no tokenizer like {tokenizer.name}; use a BPE")
    wrap = transformers().PreTrainedTokenizerFast
    from crt_lib.hf.model import CRTForCausalLM

    made = CRTForCausalLM.from_crt(model.cpu(), trained["train"]["aux_weight"])
    if choices := choices_of(path):
        made.config.calibrated = choices.policies()
    ends = ("bos", "eos", "pad")
    for part in (made.config, made.generation_config):
        for end in ends:
            setattr(part, f"{end}_token_id", tokenizer.eot_id)
    try:
        made.save_pretrained(out)
    except (SafetensorError, OSError) as error:  # a full disk, for instance
        raise InputError(f"cannot write {out}: {error}; the same command writes it anew") from error
    write_card(out, made, trained, scores_of(path), license)
    saved = out / TOKENIZER_FILE  # as transformers calls it, too
    tokenizer.save(saved)
    wrap(
        tokenizer_file=str(saved),
        **{f"{end}_token": END_OF_TEXT for end in ends},
        model_max_length=model.config.max_seq_len,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    return out


def _write_program(program: torch.export.ExportedProgram, out: Path) -> Path:
    if out.suffix == ".onnx" and not find_spec("onnxscript"):
        raise InputError(f"{out} needs onnxscript; pip install 'crt-lm[onnx]'")
    with atomic_path(out) as temporary:
        if out.suffix == ".onnx":
            how: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
            torch.onnx.export(program, f=temporary, **how)
        else:
            packed = io.BytesIO()  # its writer ends the process where a disk is full
            torch.export.save(program, packed)
            temporary.write_bytes(packed.getbuffer())
    return out
