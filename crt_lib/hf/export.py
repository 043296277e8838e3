"""A trained model for other programs: a folder of transformers, or a torch.export program."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.files import InputError, atomic_path
from crt_lib.model import CRT
from crt_lib.runs.trained import TOKENIZER_FILE, load_trained_model
from crt_lib.text.tokenizer import END_OF_TEXT, ByteLevelBPE


class FixedExit(nn.Module):
    """Ids (B, T) to the logits (B, T, V) of one exit: a forward pass without checks or choices."""

    def __init__(self, model: CRT, loop: int):
        super().__init__()
        if loop not in model.config.head_loops:
            raise InputError(
                f"loop {loop} has no head; loops with one are {model.config.head_loops}"
            )
        self.model, self.loop = model, loop

    def forward(self, ids: Tensor) -> Tensor:
        z, embedded = self.model.begin(ids)
        for loop in range(1, self.loop + 1):
            z = self.model.apply_loop(loop, z, embedded)
        return F.linear(*self.model.readout(self.loop, z))


def export_program(
    model: CRT, loop: int | None = None, *, tokens: int = 16
) -> torch.export.ExportedProgram:
    """torch.export of the forward pass up to exit `loop` (None: the last), any B and T.

    Raises InputError for a loop without a head.
    """
    fixed = FixedExit(model, model.config.n_loops if loop is None else loop).eval()
    tokens = min(tokens, model.config.max_seq_len)
    ids = torch.zeros(2, tokens, dtype=torch.int64, device=model.loop_encoding.device)
    rows = torch.export.Dim("rows", min=1)
    positions = torch.export.Dim("positions", min=2, max=model.config.max_seq_len)
    with torch.no_grad():
        return torch.export.export(fixed, (ids,), dynamic_shapes=({0: rows, 1: positions},))


def export_run(checkpoint: str | Path, out: str | Path, loop: int | None = None) -> Path:
    """Write a run's model to `out`: a program if that ends in .pt2, else a transformers folder.

    `loop`: the exit of the program. Raises InputError for a folder with a model without a BPE, for
    `loop` with a folder (its `exit_policy` chooses), and as `load_trained_model`.
    """
    out = Path(out)
    model, tokenizer, trained = load_trained_model(checkpoint)
    if not isinstance(model, CRT):
        raise InputError(f"{checkpoint} holds a {type(model).__name__}; only a CRT is exported")
    if out.suffix == ".pt2":
        with atomic_path(out) as temporary, temporary.open("wb") as file:
            torch.export.save(export_program(model.cpu(), loop), file)
        return out
    if loop is not None:
        raise InputError("an exit is fixed in a program: write to a file ending in .pt2")
    if not isinstance(tokenizer, ByteLevelBPE):
        raise InputError(
            f"tokenizer {tokenizer.name} has no counterpart in transformers; use a BPE"
        )
    try:
        from transformers import PreTrainedTokenizerFast

        from crt_lib.hf.model import CRTForCausalLM
    except ImportError as error:
        raise InputError("this needs transformers; pip install 'crt-lm[notebooks]'") from error
    made = CRTForCausalLM.from_crt(model.cpu(), trained["train"]["aux_weight"])
    ends = ("bos", "eos", "pad")
    for part in (made.config, made.generation_config):
        for end in ends:
            setattr(part, f"{end}_token_id", tokenizer.eot_id)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / TOKENIZER_FILE
        tokenizer.save(saved)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_file=str(saved),
            **{f"{end}_token": END_OF_TEXT for end in ends},
            model_max_length=model.config.max_seq_len,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )
    made.save_pretrained(out)
    wrapped.save_pretrained(out)
    return out
