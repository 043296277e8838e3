"""CRT as a model of transformers: `CRTForCausalLM`, registered with its Auto classes on import.

A saved folder has the code of this module beside the weights, so that it loads with
`trust_remote_code=True` where crt_lib is not installed. Shapes: B rows, T positions, V tokens.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step, Window
from crt_lib.config import ModelConfig
from crt_lib.data import NOT_SCORED, check_ids
from crt_lib.exits.gate import Gate
from crt_lib.exits.policy import Policy, leave, run_with_exits
from crt_lib.files import InputError, write_text
from crt_lib.hf.cache import CRTCache
from crt_lib.hf.code import folder_code
from crt_lib.hf.padding import padding_of, rotate_rows
from crt_lib.loss import total_loss
from crt_lib.model import CRT

MAIN = "modeling_crt"  # this module's name in a saved folder
_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class CRTConfig(PretrainedConfig):
    """`ModelConfig`'s fields, `aux_weight`, lambda of the loss (eq. 5), and `has_gate`.

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

    def __init__(self, aux_weight: float = 0.3, has_gate: bool = False, **kwargs: Any):
        named = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        own = {name: named.pop(name) for name in _FIELDS if name in named}
        settings = ModelConfig.from_dict(own)
        for name, value in settings.to_dict().items():
            setattr(self, name, value)
        if not 0 <= aux_weight <= 1:
            raise InputError(f"aux_weight is {aux_weight}; it must be in [0, 1]")
        self.aux_weight, self.has_gate = aux_weight, has_gate
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
    """What a forward pass returns.

    `loss`: eq. 5, with labels. `logits` (B, T, V): the last exit's, or each token's own with an
    exit policy. `exit_logits`: those of every exit in order, with labels or `output_exits`.
    `exit_loops` (B, T): where each token left, with a policy. `hidden_states`: the state that
    enters loop 1 and that after each loop, (B, T, d).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None
    past_key_values: CRTCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
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
            self.model.gate = Gate(_GateWeights(self))
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
        return self.lm_head if self.config.tie_word_embeddings else self.model.heads[self._last]

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head = new_embeddings
        else:
            self.model.heads[self._last] = new_embeddings

    @property
    def _last(self) -> str:
        return list(self.model.heads)[-1]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers has it; the heads of all exits are resized."""
        made = super().resize_token_embeddings(*args, **kwargs)
        vocabulary = made.weight.shape[0]
        if not self.config.tie_word_embeddings:
            for name, head in self.model.heads.items():
                if head.weight.shape[0] != vocabulary:
                    how = {k: v for k, v in kwargs.items() if k == "mean_resizing"}
                    resized = self._get_resized_lm_head(head, vocabulary, **how)
                    self.model.heads[name] = resized
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

        `attention_mask` (B, T), or (B, past + T) with a cache: zeros to the left or right of each
        row's tokens. `labels` are the ids, as transformers has it, -100 where nothing is scored.
        `exit_policy`: a `Policy`, a criterion's name, or the exit for all, in inference.
        `logits_to_keep`: of the last so many positions, or of those given; 0: of all. With a cache
        there are no gradients. Attention's weights are never made.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("give input_ids or inputs_embeds, one of the two")
        self._check(inputs, past_key_values)
        if exit_policy is not None and (labels is not None or output_hidden_states or output_exits):
            raise InputError("an exit policy gives each token's own logits: no loss, no states")
        if labels is not None and past_key_values is not None:
            raise InputError("the loss is of whole rows; leave out past_key_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (use_cache or past_key_values is not None) and labels is None:
            cache = CRTCache() if past_key_values is None else past_key_values
        else:
            cache = None
        starts = padding_of(attention_mask, inputs, cache)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if padded and not self.model.config.causal:
            raise InputError("this model sees the future, padding too; give rows of one length")
        if exit_policy is not None:
            output = self._exit(inputs, starts, cache, exit_policy, logits_to_keep)
        else:
            states = bool(output_hidden_states)
            output = self._full(inputs, starts, cache, labels, states, output_exits, logits_to_keep)
            if labels is not None and output.exit_logits is not None:
                output.loss = self._loss(output.exit_logits, labels, **kwargs)
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def _check(self, inputs: Tensor, cache: CRTCache | None) -> None:
        longest = self.model.config.max_seq_len
        if not inputs.is_floating_point():
            check_ids(inputs, self.model.config)
        elif inputs.shape[1] > longest:
            raise InputError(f"{inputs.shape[1]} positions are more than max_seq_len, {longest}")
        if cache is not None and not isinstance(cache, CRTCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}; give a CRTCache")

    def _exit(
        self,
        inputs: Tensor,
        starts: Tensor | None,
        cache: CRTCache | None,
        policy: Policy | str | int,
        logits_to_keep: int | Tensor,
    ) -> CRTOutput:
        if isinstance(policy, str):
            policy = Policy(policy)
        elif isinstance(policy, int):
            policy = Policy(fixed=policy)
        held = CRTCache() if cache is None else cache
        memory = self._memory(held, inputs, starts)
        step = held.step(self.model, inputs)
        if step is not None:
            with torch.no_grad():
                exited = leave(step, inputs[:, 0], policy)
            logits = exited.logits[:, None][:, _kept(logits_to_keep)]
            loops = exited.loops[:, None]
            return CRTOutput(logits=logits, exit_loops=loops, past_key_values=cache)
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        exited = run_with_exits(self.model, inputs, policy, memory, last=last)
        logits = exited.logits if last else exited.logits[:, _kept(logits_to_keep)]
        return CRTOutput(logits=logits, exit_loops=exited.loops, past_key_values=cache)

    def _full(
        self,
        inputs: Tensor,
        starts: Tensor | None,
        cache: CRTCache | None,
        labels: Tensor | None,
        with_states: bool,
        with_exits: bool,
        logits_to_keep: int | Tensor,
    ) -> CRTOutput:
        model = self.model
        memory, back = None, None
        if cache is not None:
            memory = self._memory(cache, inputs, starts)
        elif starts is not None:  # causal: padding after the tokens changes nothing before it
            inputs, back = rotate_rows(inputs, starts), -starts
        logits = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and memory is None):
            step = cache.step(model, inputs) if cache is not None else None
            states = _states(step or Window(model, memory), inputs)
        if back is not None:
            states = [rotate_rows(state, back) for state in states]
        every = labels is not None or with_exits
        kept = slice(None) if labels is not None else _kept(logits_to_keep)
        for loop in model.config.head_loops if every else (model.config.n_loops,):
            if step is None:
                logits.append(F.linear(*model.readout(loop, states[loop][:, kept])))
            else:
                features, vocabulary = step.readout(loop, states[loop][:, 0])
                logits.append(vocabulary(features)[:, None][:, kept])
        return CRTOutput(
            logits=logits[-1],
            exit_logits=tuple(logits) if every else None,
            past_key_values=cache,
            hidden_states=tuple(states) if with_states else None,
        )

    def _memory(self, cache: CRTCache, inputs: Tensor, starts: Tensor | None) -> Memory:
        like = self.model.loop_encoding.detach()
        rows, n = inputs.shape[:2]
        return cache.room_for(self.model.config, rows, n, like, starts)

    def _loss(self, exit_logits: tuple[Tensor, ...], labels: Tensor, **kwargs: Any) -> Tensor:
        vocabulary = self.model.config.vocab_size
        losses = {
            loop: self.loss_function(
                logits, labels, vocab_size=vocabulary, ignore_index=NOT_SCORED, **kwargs
            )
            for loop, logits in zip(self.model.config.head_loops, exit_logits, strict=True)
        }
        return total_loss(losses, self.config.aux_weight)

    # transformers' annotation says bool; nothing is returned, and nothing reads it
    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        made = model_kwargs.get("past_key_values")
        if made is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = CRTCache()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = None,
        use_cache: bool | None = None,
        exit_policy: Policy | str | int | None = None,
        logits_to_keep: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache does not have yet, and what else `forward` takes."""
        done = past_key_values.get_seq_length() if past_key_values is not None else 0
        given = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "exit_policy": exit_policy,
            "output_hidden_states": output_hidden_states,
        }
        if logits_to_keep is not None:
            given["logits_to_keep"] = logits_to_keep
        if inputs_embeds is not None and not done:
            return given | {"inputs_embeds": inputs_embeds}
        if next_sequence_length is not None:
            return given | {"input_ids": input_ids[:, -next_sequence_length:]}
        total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        new = total - done
        whole = 0 < new < input_ids.shape[1]  # else only the new ones were given
        return given | {"input_ids": input_ids[:, -new:] if whole else input_ids}

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers has it, and the code beside the weights; InputError for push_to_hub."""
        if kwargs.get("push_to_hub"):
            raise InputError("save to a folder, then `hf upload` it: the code must go with it")
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for name, text in folder_code(MAIN, Path(__file__)).items():
            write_text(Path(save_directory) / f"{name}.py", text)


def _states(run: Window | Step, inputs: Tensor) -> list[Tensor]:
    """The state (B, n, d) that enters loop 1 and that after each loop."""
    n_loops, single = run.model.config.n_loops, isinstance(run, Step)
    states = [run.begin(inputs[:, 0] if single else inputs)]
    for loop in range(1, n_loops + 1):
        states.append(run.loop(loop, states[-1]))
    run.end(n_loops)
    return [state[:, None] for state in states] if single else states


class _GateWeights(Mapping[int, Tensor]):
    """Those of a model whose gate is among its buffers, by exit loop."""

    def __init__(self, model: CRTForCausalLM):
        self._buffers = cast(dict[str, Tensor], model._buffers)
        self._loops = model.config.exit_loops

    def __getitem__(self, loop: int) -> Tensor:
        return self._buffers[f"gate_{loop}"]

    def __iter__(self) -> Iterator[int]:
        return iter(self._loops)

    def __len__(self) -> int:
        return len(self._loops)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None) if logits_to_keep else slice(None)
    return logits_to_keep


AutoConfig.register(CRTConfig.model_type, CRTConfig, exist_ok=True)
AutoModelForCausalLM.register(CRTConfig, CRTForCausalLM, exist_ok=True)
