"""Baselines built with transformers, with the face of `CRT`, so that one training runs both."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from crt_lib.config import GPT2Config
from crt_lib.files import InputError
from crt_lib.loss import exit_losses


class GPT2(nn.Module):
    """transformers' GPT-2 with tied embeddings. Token ids (B, T) in, {n_layers: logits} out.

    With `config.kind` "shared" its layers are one layer, applied again and again, as in ALBERT (Lan
    et al. 2020, arXiv:1909.11942), and initialised as one.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        theirs = transformers().GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers if config.kind == "gpt2" else 1,
            n_head=config.n_heads,
            activation_function="gelu_pytorch_tanh",  # gelu_new's values in one kernel
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.transformer = transformers().GPT2Model(theirs)
        self._checkpointing = False
        if config.kind == "shared":
            repeated = _Repeated(self.transformer.h[0], config.n_layers)
            self.transformer.h = cast(nn.ModuleList, repeated)  # it is only iterated over

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer's activations are computed again in the backward pass."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on != self._checkpointing:
            model = self.transformer
            (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        self._checkpointing = on

    def compile_block(self) -> None:
        """Compile the layers in place with torch.compile."""
        self.transformer.compile()

    def forward(
        self,
        ids: Tensor,
        exits: Sequence[int] | None = None,
        targets: Tensor | None = None,
        reduction: str = "mean",
    ) -> dict[int, Tensor]:
        """As `CRT.forward`; the one exit is after the last layer, and torch checks the ids."""
        loop = self.config.n_layers
        if exits is not None and tuple(exits) != (loop,):
            raise InputError(f"a GPT-2 has one exit, {loop}; asked for {tuple(exits)}")
        features = self.transformer(ids).last_hidden_state
        weight = self.transformer.wte.weight
        if targets is None:
            return {loop: F.linear(features, weight)}
        return {loop: exit_losses([features], weight, targets, reduction)[0]}


class _Repeated(nn.Module):
    """One layer where a list of `times` layers is expected."""

    def __init__(self, layer: nn.Module, times: int):
        super().__init__()
        self.layer, self.times = layer, times

    def __iter__(self) -> Iterator[nn.Module]:
        return itertools.repeat(self.layer, self.times)


def transformers() -> ModuleType:
    """The package, which is optional; raises InputError where it is not installed."""
    try:
        import transformers as found
    except ImportError as error:
        raise InputError("this needs transformers; pip install 'crt-lm[notebooks]'") from error
    return found


def load_pretrained(name: str | Path, *, local: bool = False) -> nn.Module:
    """A causal language model of transformers, from a folder or, unless `local`, from the hub.

    Only safetensors: nothing is unpickled. Raises InputError when it cannot be had.
    """
    from crt_lib.hf import model as _ours  # noqa: F401  transformers then knows our own exports

    loader = transformers().AutoModelForCausalLM
    if local and not Path(name).is_dir():
        raise InputError(f"{name} is not a folder; download the model first")
    try:
        return loader.from_pretrained(name, local_files_only=local, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise cannot_be_had(name, error) from error


def cannot_be_had(name: str | Path, error: Exception) -> InputError:
    """Why a model of transformers is not there, in one line; of an id of the hub, the way out."""
    why = " ".join(str(error).split())
    if not Path(name).is_dir():
        why += (
            f" Without a network: `hf download {name} --local-dir FOLDER` where there is one, then "
            "give FOLDER"
        )
    return InputError(f"{name} is not a causal model that can be loaded: {why}")
