"""CRT as a model of transformers: `CRTForCausalLM`, registered with its Auto classes on import.

A saved folder has the code of this module beside the weights, so that it loads with
`trust_remote_code=True` where crt_lib is not installed. Shapes: B rows, T positions, V tokens.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import CandidateGenerator, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from crt_lib.exits.gate import Gate
from crt_lib.exits.policy import Policy
from crt_lib.files import InputError
from crt_lib.hf.cache import CRTCache, check_inputs, is_hooked, states_of
from crt_lib.hf.config import CRTConfig
from crt_lib.hf.hub import OPTIONS, upload, write_card_if_none, write_code
from crt_lib.loss import total_loss
from crt_lib.model import CRT


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

    @property
    def last_hidden_state(self) -> Tensor:
        """Not given: a loss made of it, as TRL's trainers make theirs, would train one exit."""
        raise InputError(
            "a loss of the last state alone would leave the other exits untrained; with TRL: "
            "class Exits(SFTTrainer): compute_loss = Trainer.compute_loss"
        )


class CRTForCausalLM(PreTrainedModel, GenerationMixin):
    """`crt_lib.model.CRT` with transformers' face. Raises InputError as `CRT` does.

    `after_loop["2"]` is called with the state (B, T, d) after loop 2, and hands it on: a forward
    hook of it sees that state, or gives another. The exit gate of a run, if it has one, is among
    the buffers. A model is on one device: its heads read weights past the hooks by which accelerate
    would offload them, and past adapters.
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
        loops = range(1, config.n_loops + 1)
        self.after_loop = nn.ModuleDict({str(loop): nn.Identity() for loop in loops})
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
            if name in new:  # else a part of a quantised weight
                own[name].copy_(new[name])

    @property
    def base_model(self) -> nn.Module:
        """The model itself: without its heads it has no face of transformers."""
        return self

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
        fastest calibrated, or a criterion as it was calibrated; an InputError for another one.
        With a cache there are no gradients. Attention's weights are never made.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("give input_ids or inputs_embeds, one of the two")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self._check_use(attention_mask, kwargs)
        hooked = any(is_hooked(point) for point in self.after_loop.values())
        more = labels is not None or output_hidden_states or output_exits or hooked
        if exit_policy is not None and more:
            raise InputError("an exit policy gives a token's own logits; no loss, states or hooks")
        if labels is not None and past_key_values is not None:
            raise InputError("the loss is of whole rows; leave out past_key_values")
        new = past_key_values is None and use_cache and labels is None
        cache = CRTCache() if new else past_key_values
        starts = check_inputs(self.model.config, inputs, attention_mask, cache)
        asked = 0 if labels is not None else logits_to_keep
        kept = slice(-asked or None, None) if isinstance(asked, int) else asked
        if exit_policy is not None or (cache is not None and not more):
            output = self._exit(inputs, starts, cache, exit_policy, kept)
        else:
            states = states_of(self.model, inputs, starts, cache, self.after_loop)
            output = CRTOutput(
                **self._read_out(states, kept, labels, output_exits, kwargs),
                past_key_values=cache,
                hidden_states=tuple(states) if output_hidden_states else None,
            )
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def _check_use(self, mask: Tensor | None, given: dict[str, Any]) -> None:
        """InputError for what would be left out of the result without a word."""
        if given.get("output_attentions", self.config.output_attentions):
            raise InputError("attention's weights are never made; leave out output_attentions")
        at = None if torch.compiler.is_compiling() else given.get("position_ids")
        if at is not None and mask is None and bool((at.diff(dim=-1) != 1).any()):
            raise InputError("position_ids start anew in a row; give each text its own row")
        tied = self.config.tie_word_embeddings
        read = [self.lm_head] if tied else [*self.model.heads.values()]
        if not all(isinstance(head, nn.Linear) for head in read):
            raise InputError(
                "the heads' weights are read, what is wrapped around them is not: leave heads and "
                "lm_head out; PEFT: exclude_modules=r'.*head.*'"
            )

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

    def _policy(self, asked: Policy | Mapping[str, Any] | str | int | None) -> Policy:
        if isinstance(asked, Policy):
            return asked
        known = self.config.calibrated
        if isinstance(asked, str) and asked not in known:
            if asked != "auto":
                Policy(asked)  # or an error: it is no criterion
            raise InputError(
                f"{asked} was not calibrated, or failed its test: `crt calibrate` a run before its "
                "export, or give a Policy with thresholds"
            )
        found = known[asked] if isinstance(asked, str) else asked
        if isinstance(found, Mapping):
            return Policy(**found)
        if isinstance(found, bool) or not isinstance(found, int | None):
            raise InputError(f"exit_policy is {asked!r}; give a Policy, a loop or a name")
        return Policy(fixed=found)

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
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise InputError(f"the cache is a CRTCache, not {kind}; leave out cache_implementation")
        if (policy := getattr(generation_config, "exit_policy", None)) is not None:
            model_kwargs.setdefault("exit_policy", policy)
        made = model_kwargs.get("past_key_values")
        if made is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = CRTCache()

    def _get_candidate_generator(  # type: ignore[override]
        self, generation_config: GenerationConfig, *, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        """As transformers has it; `assistant_early_exit` is the exit of our own drafts."""
        own = copy.copy(generation_config)
        loop, own.assistant_early_exit = own.assistant_early_exit, None
        vars(own)["exit_policy"] = loop  # the text's policy is not the draft's
        if loop is not None:
            kwargs["assistant_model"] = self
        given = {name: value for name, value in model_kwargs.items() if name != "exit_policy"}
        mixin = cast(Any, super())
        return cast(
            CandidateGenerator, mixin._get_candidate_generator(own, model_kwargs=given, **kwargs)
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Always an InputError."""
        raise InputError("continuous batching needs transformers' own attention; use generate")

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers has it, and the code beside the weights; on the hub a card, too."""
        hub = {name: kwargs.pop(name) for name in OPTIONS & set(kwargs)}
        own = self.generation_config
        if (policy := getattr(own, "exit_policy", None)) is not None:
            checked = self._policy(policy)
            vars(own)["exit_policy"] = vars(checked) if isinstance(policy, Policy) else policy
        own._from_model_config = None  # else its exit policy is not read again
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return None
        folder = Path(save_directory)
        write_code(Path(__file__), folder)
        if not push_to_hub:
            return None
        write_card_if_none(self, folder, hub.get("repo_id") or folder.name, hub.get("tags"))
        return upload(folder, hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """As transformers has it, with the code and the card; raises InputError where it cannot."""
        with TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)


AutoConfig.register(CRTConfig.model_type, CRTConfig, exist_ok=True)
AutoModelForCausalLM.register(CRTConfig, CRTForCausalLM, exist_ok=True)
