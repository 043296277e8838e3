"""The configuration of CRT in transformers: `CRTConfig`."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.hf.hub import MAIN

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class CRTConfig(PretrainedConfig):
    """`ModelConfig`'s fields, `aux_weight`, lambda of the loss (eq. 5), and `has_gate`.

    `calibrated`: settings of `Policy` by name, of `crt calibrate`; "auto" is the fastest.
    Raises InputError for values that `ModelConfig` refuses.
    """

    model_type = "crt"
    keys_to_ignore_at_inference = ["past_key_values", "exit_logits", "hidden_states"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_loops",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        aux_weight: float = 0.3,
        has_gate: bool = False,
        calibrated: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        named = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        own = {name: named.pop(name) for name in _FIELDS if name in named}
        settings = ModelConfig.from_dict(own)
        for name, value in settings.to_dict().items():
            setattr(self, name, value)
        if not 0 <= aux_weight <= 1:
            raise InputError(f"aux_weight is {aux_weight}; it must be in [0, 1]")
        self.aux_weight, self.has_gate = aux_weight, has_gate
        self.calibrated = calibrated or {}
        named["tie_word_embeddings"] = settings.head_sharing == "tied"
        named["auto_map"] = {
            "AutoConfig": "hf_config.CRTConfig",  # this module in a saved folder
            "AutoModelForCausalLM": f"{MAIN}.CRTForCausalLM",
        }
        super().__init__(**named)

    @property
    def settings(self) -> ModelConfig:
        """The same as crt_lib has it."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _FIELDS})
