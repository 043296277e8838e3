"""CRT as a model of transformers: `CRTForCausalLM`, registered with its Auto classes on import.

A saved folder has the code of this module beside the weights, so that it loads with
`trust_remote_code=True` where crt_lib is not installed. Shapes: B rows, T positions, V tokens.
"""

import dataclasses
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from crt_lib.config import ModelConfig
from crt_lib.exits.gate import Gate
from crt_lib.exits.policy import Policy
from crt_lib.files import InputError, write_text
from crt_lib.hf.cache import CRTCache, check_inputs, states_of
from crt_lib.loss import total_loss
from crt_lib.model import CRT

MAIN = "modeling_crt"  # this module's name in a saved folder
OURS = re.compile(r"^(\s*from )(crt_lib)?\.([\w.]+)(?= import)", re.MULTILINE)
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
            "AutoConfig": f"{MAIN}.CRTConfig",
            "AutoModelForCausalLM": f"{MAIN}.CRTForCausalLM",
        }
        super().__init__(**named)

    @property
    def settings(self) -> ModelConfig:
        """The same as crt_lib has it."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _FIELDS})


@dataclass
class CRTOutput(ModelOutput):
    """What a forward pass returns."""

    loss: Tensor | None = None  # eq. 5, with labels
    logits: Tensor | None = None  # (B, T, V) of the last exit, or of each token's own with a policy
    exit_logits: tuple[Tensor, ...] | None = None  # every exit's, with labels or `output_exits`
    exit_loops: Tensor | None = None  # (B, T) where each token left, with a policy
    past_key_values: CRTCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # (B, T, d) entering loop 1, and after each
    attentions: None = None


class CRTForCausalLM(PreTrainedModel, GenerationMixin):
    """`crt_lib.model.CRT` with transformers' face. Raises InputError as `CRT` does.

    The exit gate of a run, if it has one, is among the buffers. A model is on one device: its heads
    read weights past the hooks by which accelerate would offload them.
    """

    config: CRTConfig
    config_class = CRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "TRMEmbedding"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CRTConfig):
        super().__init__(config)
        self.model = CRT(config.settings)
        if config.has_gate:
            width = config.d_model + 1
            for loop in config.exit_loops:
                self.register_buffer(f"gate_{loop}", torch.zeros(width))
        if config.tie_word_embeddings:
            embedding = self.model.embed.tokens
            self.lm_head = nn.Linear(embedding.embedding_dim, config.vocab_size, bias=False)
            self.lm_head.weight = embedding.weight
        for value in self.state_dict(keep_vars=True).values():
            value._is_hf_initialized = not value.is_meta
        self.post_init()

    @classmethod
    def from_crt(cls, model: CRT, aux_weight: float = 0.3) -> "CRTForCausalLM":
        """A model with the settings and a copy of the weights of `model`."""
        has_gate = model.gate is not None
        config = CRTConfig(aux_weight, has_gate, **model.config.to_dict())
        # torch's own `to`, which transformers wraps without its types
        made = cls(config).to(model.loop_encoding)  # type: ignore[arg-type]
        made.model.load_state_dict(model.state_dict())
        for loop in model.config.exit_loops if has_gate else ():
            getattr(made, f"gate_{loop}").copy_(model.gate.weights[loop])
        return made.train(model.training)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """What a folder had no weights for, or of another size, is as in a new model."""
        own = self.state_dict(keep_vars=True)
        missing = [name for name in own if not getattr(own[name], "_is_hf_initialized", False)]
        new = type(self)(self.config).state_dict() if missing else {}
        for name in missing:
            own[name].copy_(new[name])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed.tokens = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Linear:
        """The vocabulary matrix of the last exit."""
        tied = self.config.tie_word_embeddings
        return self.lm_head if tied else cast(nn.Linear, [*self.model.heads.values()][-1])

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head = new_embeddings
        else:
            self.model.heads[[*self.model.heads][-1]] = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers has it; the heads of all exits are resized."""
        made = super().resize_token_embeddings(*args, **kwargs)
        vocabulary = made.weight.shape[0]
        for name, head in self.model.heads.items():
            if not self.config.tie_word_embeddings and head.weight.shape[0] != vocabulary:
                self.model.heads[name] = self._get_resized_lm_head(head, vocabulary)
        self.model.config = self.config.settings
        return made

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CRTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_exits: bool = False,
        exit_policy: Policy | str | int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CRTOutput | tuple[Any, ...]:
        """Ids (B, T), or token embeddings, to logits; with `labels` (B, T) also the loss.

        Arguments as transformers has them; `attention_mask` may be zero on the left or right of a
        row's tokens. `exit_policy`, in inference: a `Policy`, the exit for all, "auto" for the
        fastest calibrated, or a criterion as it was calibrated, else with the paper's thresholds.
        With a cache there are no gradients. Attention's weights are never made.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("give input_ids or inputs_embeds, one of the two")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        more = labels is not None or output_hidden_states or output_exits
        if exit_policy is not None and more:
            raise InputError("an exit policy gives each token's own logits: no loss, no states")
        if labels is not None and past_key_values is not None:
            raise InputError("the loss is of whole rows; leave out past_key_values")
        cache = past_key_values
        if cache is None and use_cache and labels is None:
            cache = CRTCache()
        starts = check_inputs(self.model.config, inputs, attention_mask, cache)
        kept = logits_to_keep if labels is None else slice(None)
        if isinstance(kept, int):
            kept = slice(-kept or None, None)
        if exit_policy is not None or (cache is not None and not more):
            output = self._exit(inputs, starts, cache, exit_policy, kept)
        else:
            states = states_of(self.model, inputs, starts, cache)
            output = CRTOutput(
                **self._read_out(states, kept, labels, output_exits, kwargs),
                past_key_values=cache,
                hidden_states=tuple(states) if output_hidden_states else None,
            )
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def _exit(
        self,
        inputs: Tensor,
        starts: Tensor | None,
        cache: CRTCache | None,
        policy: Policy | str | int | None,
        kept: slice | Tensor,
    ) -> CRTOutput:
        """Each token's own exit, the last one without a policy; no gradients."""
        if self.config.has_gate:
            weights = {loop: self.get_buffer(f"gate_{loop}") for loop in self.config.exit_loops}
            self.model.gate = Gate(weights)
        asked = self._policy(policy)
        last = isinstance(kept, slice) and kept.start == -1
        held = CRTCache() if cache is None else cache
        exited = held.run(self.model, inputs, starts, asked, last=last)
        loops = None if policy is None else exited.loops
        return CRTOutput(logits=exited.logits[:, kept], exit_loops=loops, past_key_values=cache)

    def _policy(self, asked: Policy | str | int | None) -> Policy:
        if isinstance(asked, Policy):
            return asked
        if not isinstance(asked, str):
            return Policy(fixed=asked)
        known = self.config.calibrated
        if asked not in known:
            if asked == "auto":
                raise InputError("nothing was calibrated: `crt calibrate` a run before its export")
            return Policy(asked)
        exits = known[asked].get("exits")
        return Policy(**{**known[asked], "exits": exits if exits is None else tuple(exits)})

    def _read_out(
        self,
        states: list[Tensor],
        kept: slice | Tensor,
        labels: Tensor | None,
        output_exits: bool,
        loss_arguments: dict[str, Any],
    ) -> dict[str, Any]:
        config = self.model.config
        every = output_exits or labels is not None
        logits = {
            loop: F.linear(*self.model.readout(loop, states[loop][:, kept]))
            for loop in (config.head_loops if every else (config.n_loops,))
        }
        found: dict[str, Any] = {"logits": logits[config.n_loops]}
        if every:
            found["exit_logits"] = tuple(logits.values())
        if labels is not None:
            how = {"labels": labels, "vocab_size": config.vocab_size, **loss_arguments}
            losses = {loop: self.loss_function(own, **how) for loop, own in logits.items()}
            found["loss"] = total_loss(losses, self.config.aux_weight)
        return found

    # transformers' annotation says bool; nothing is returned, and nothing reads it
    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if (policy := getattr(generation_config, "exit_policy", None)) is not None:
            model_kwargs.setdefault("exit_policy", policy)
        made = model_kwargs.get("past_key_values")
        if made is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = CRTCache()

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers has it, and the code beside the weights; InputError for push_to_hub."""
        if kwargs.get("push_to_hub"):
            raise InputError("save to a folder, then `hf upload` it: the code must go with it")
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for name, text in _folder_code(Path(__file__)).items():
            write_text(Path(save_directory) / f"{name}.py", text)


def _folder_code(here: Path) -> dict[str, str]:
    """The module in the file `here`, and those of crt_lib it needs, as a saved folder's own.

    Texts by name: `crt_lib.a.b` is `a_b` there. `here` may lie in such a folder itself.
    """
    texts: dict[str, str] = {}
    waiting = {MAIN: here}
    while waiting:
        name, path = waiting.popitem()
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\nif TYPE_CHECKING:\n(    .*\n)+", "", text)
        texts[name] = OURS.sub(lambda found: f"{found[1]}.{found[3].replace('.', '_')}", text)
        for _, package, module in OURS.findall(text):
            inside = here.parents[1] / f"{module.replace('.', '/')}.py"
            needed = module.replace(".", "_")
            if needed not in texts:
                waiting[needed] = inside if package else here.with_name(f"{needed}.py")
    return texts


AutoConfig.register(CRTConfig.model_type, CRTConfig, exist_ok=True)
AutoModelForCausalLM.register(CRTConfig, CRTForCausalLM, exist_ok=True)
