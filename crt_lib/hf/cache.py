"""What CRT keeps of past positions, where transformers' generation expects a cache."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from crt_lib.cached.memory import Memory
from crt_lib.cached.step import Step
from crt_lib.config import ModelConfig
from crt_lib.files import InputError
from crt_lib.model import CRT


class CRTCache(Cache):
    """`crt_lib.cached.memory.Memory` where transformers expects a cache; it doubles when full."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.memory: Memory | None = None
        self._step: Step | None = None

    def step(self, model: CRT, inputs: Tensor) -> Step | None:
        """The fast way for one more token a row; None where it is none, as for embeddings."""
        memory = self.memory
        if memory is None or inputs.shape[1:] != (1,) or model.training:
            return None
        if memory.starts is not None and int(memory.starts.max()) > memory.length:
            return None  # padding is no token
        if self._step is None or (self._step.model, self._step.rows) != (model, memory.rows):
            self._step = Step(model, memory)
        return self._step

    def room_for(
        self, config: ModelConfig, rows: int, n: int, like: Tensor, starts: Tensor | None
    ) -> Memory:
        """The memory, made on first use, with room for `n` more positions of `rows` texts."""
        wanted = self.get_seq_length() + n
        if self.memory is None:
            self.memory = Memory(config, rows, wanted, like, starts)
        elif rows != self.memory.rows:
            raise InputError(f"the cache holds {self.memory.rows} texts; {rows} were given")
        elif wanted > self.memory.capacity:
            self.memory.reserve(max(wanted, min(2 * self.memory.capacity, config.max_seq_len)))
        return self.memory

    def check_starts(self, starts: Tensor) -> None:
        """Raise InputError unless padding (B,) on the left is what the cache was filled with.

        A row of nothing but padding so far may have more.
        """
        memory = self.memory
        assert memory is not None  # asked of a cache that holds positions
        before = memory.starts
        held = torch.zeros_like(starts) if before is None else before
        empty = held >= memory.length
        if not bool(((starts == held) | (empty & (starts > held))).all()):
            raise InputError("attention_mask pads other positions than those the cache holds")
        if before is not None:
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

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.memory is not None:
            rows = torch.arange(self.memory.rows, device=self.memory.kv.device)
            self.memory.select(rows.repeat_interleave(repeats))
