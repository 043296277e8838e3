"""A trained model for other programs: a folder of transformers, or a torch.export program."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.exits.policy import Policy, exits_of
from crt_lib.files import InputError, atomic_path
from crt_lib.hf.gpt2 import transformers
from crt_lib.model import CRT
from crt_lib.runs.trained import TOKENIZER_FILE, as_crt, load_trained_model
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
    _, last = exits_of(Policy(fixed=loop), model.config)
    fixed = FixedExit(model, last).eval()
    tokens = min(16, model.config.max_seq_len)
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
    loaded, tokenizer, trained = load_trained_model(checkpoint)
    model = as_crt(loaded, checkpoint)
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
    wrap = transformers().PreTrainedTokenizerFast
    from crt_lib.hf.model import CRTForCausalLM

    made = CRTForCausalLM.from_crt(model.cpu(), trained["train"]["aux_weight"])
    ends = ("bos", "eos", "pad")
    for part in (made.config, made.generation_config):
        for end in ends:
            setattr(part, f"{end}_token_id", tokenizer.eot_id)
    made.save_pretrained(out)
    saved = out / TOKENIZER_FILE  # as transformers calls it, too
    tokenizer.save(saved)
    wrapped = wrap(
        tokenizer_file=str(saved),
        **{f"{end}_token": END_OF_TEXT for end in ends},
        model_max_length=model.config.max_seq_len,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out)
    return out
