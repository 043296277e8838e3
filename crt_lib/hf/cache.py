"""Past positions and padded rows, as transformers' generation has them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step, Window
from crt_lib.config import ModelConfig
from crt_lib.data import check_ids
from crt_lib.exits.policy import Exited, Policy, leave, run_with_exits
from crt_lib.files import InputError
from crt_lib.model import CRT


class CRTCache(Cache):
    """`crt_lib.cached.memory.Memory` where transformers expects a cache; it doubles when full."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.memory: Memory | None = None
        self._step: Step | None = None

    @torch.no_grad()
    def run(
        self, model: CRT, inputs: Tensor, starts: Tensor | None, policy: Policy, *, last: bool
    ) -> Exited:
        """As `run_with_exits` after what it holds; one more token a row, the fast way."""
        memory = self.room_for(model, inputs, starts)
        padding = memory.starts is not None and int(memory.starts.max()) > memory.length
        if inputs.shape[1:] != (1,) or model.training or padding or not is_plain(model):
            return run_with_exits(model, inputs, policy, memory, last=last)
        if self._step is None or (self._step.model, self._step.rows) != (model, memory.rows):
            self._step = Step(model, memory)
        exited = leave(self._step, inputs[:, 0], policy)
        return Exited(exited.logits[:, None], exited.loops[:, None])

    def room_for(self, model: CRT, inputs: Tensor, starts: Tensor | None) -> Memory:
        """The memory, made on first use, with room for `inputs` (B, T) or (B, T, width) too."""
        rows, n = inputs.shape[:2]
        wanted, most = self.get_seq_length() + n, model.config.max_seq_len
        if self.memory is None:
            self.memory = Memory(model.config, rows, wanted, model.loop_encoding.detach(), starts)
        elif rows != self.memory.rows:
            raise InputError(f"the cache holds {self.memory.rows} texts; {rows} were given")
        elif wanted > self.memory.capacity:
            self.memory.reserve(max(wanted, min(2 * self.memory.capacity, most)))
        return self.memory

    def check_starts(self, starts: Tensor) -> None:
        """Raise InputError unless padding (B,) on the left is what the cache was filled with.

        A row of nothing but padding so far may have more.
        """
        memory = self.memory
        if memory is None or not memory.length:
            return
        held = torch.zeros_like(starts) if memory.starts is None else memory.starts
        same = (starts == held) | ((held >= memory.length) & (starts > held))
        if not bool(same.all()):
            raise InputError("attention_mask pads other positions than those the cache holds")
        if memory.starts is not None:
            memory.starts = starts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that it holds."""
        return 0 if self.memory is None else self.memory.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues the text that row `beam_idx[i]` held (beam search)."""
        if self.memory is not None:
            self.memory.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n positions; a positive n, as earlier versions have it, keeps n."""
        n = int(tokens_to_remove)  # some callers give a tensor
        if self.memory is not None and n != 0:
            self.memory.truncate(n if n > 0 else self.memory.length + n)


def is_plain(model: nn.Module) -> bool:
    """Whether its parts are torch's and our own, and nobody looks at what they return.

    Adapters and quantised layers have no weight to read past them, and a hook wants to be called.
    """
    ours = type(model).__module__.rpartition(".")[0]
    return not any(
        is_hooked(part) or not type(part).__module__.startswith((ours, "torch.nn.modules."))
        for part in model.modules()
    )


def is_hooked(part: nn.Module) -> bool:
    """Whether it has forward hooks."""
    return bool(part._forward_hooks or part._forward_pre_hooks)


def check_inputs(
    config: ModelConfig, inputs: Tensor, mask: Tensor | None, cache: CRTCache | None
) -> Tensor | None:
    """How many padding tokens each row has on its left (B,), None where no row has any.

    Raises InputError for ids (B, T) or embeddings that a model of `config` cannot read, another
    cache, and a mask of another shape, with zeros among a row's tokens, with other padding than the
    cache was filled with, or padding that the model would see. While a graph is made of it, values
    are not looked at.
    """
    embedded = inputs.is_floating_point()
    check_ids(torch.zeros(inputs.shape[:2], dtype=torch.int64) if embedded else inputs, config)
    if cache is not None and not isinstance(cache, CRTCache):
        raise InputError(f"past_key_values is a {type(cache).__name__}; give a CRTCache")
    if mask is None:
        return None
    done = 0 if cache is None else cache.get_seq_length()
    wanted = inputs.shape[0], done + inputs.shape[1]
    if mask.shape != wanted:
        raise InputError(
            f"attention_mask is {tuple(mask.shape)}; give {wanted}, ones for tokens and zeros for "
            "padding"
        )
    mask, graph = mask != 0, torch.compiler.is_compiling()
    if not config.causal and (graph or not bool(mask.all())):
        raise InputError("this model sees the future, padding too; give rows of one length")
    starts = torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])
    if graph:
        return starts
    begins = F.pad(mask.int(), (1, 0)).diff() > 0
    if bool((begins.sum(1) > 1).any()):
        raise InputError("attention_mask has zeros between a row's tokens; pad on one side")
    if cache is not None:
        cache.check_starts(starts)
    return starts if bool(starts.any()) else None


def states_of(
    model: CRT,
    inputs: Tensor,
    starts: Tensor | None,
    cache: CRTCache | None,
    points: nn.ModuleDict,
) -> list[Tensor]:
    """The state (B, T, d) that enters loop 1 and those after each; with a cache no gradients.

    The state after loop k is what `points[str(k)]` makes of it.
    """
    memory = None if cache is None else cache.room_for(model, inputs, starts)
    turned = starts if memory is None else None
    if turned is not None:  # causal: padding after the tokens changes nothing before it
        inputs = _rotated(inputs, turned)
    run = Window(model, memory)
    with torch.set_grad_enabled(torch.is_grad_enabled() and memory is None):
        z = run.begin(inputs)
        states = [z if turned is None else _rotated(z, -turned)]
        for loop in range(1, model.config.n_loops + 1):
            z = run.loop(loop, z)
            seen = points[str(loop)](z if turned is None else _rotated(z, -turned))
            z = seen if turned is None else _rotated(seen, turned)
            states.append(seen)
        run.end(model.config.n_loops)
    return states


def _rotated(x: Tensor, by: Tensor) -> Tensor:
    """Each row of x (B, T, ...) turned to the left by `by` (B,) positions, the first to the end."""
    at = torch.arange(x.shape[1], device=x.device) + by[:, None]
    return x[torch.arange(len(x), device=x.device)[:, None], at % x.shape[1]]
