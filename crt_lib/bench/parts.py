"""Where a training step's time goes: each part's seconds in the step itself, and its bound.

`Clock.watch` hears when the forward pass, or the backward pass, goes from one part of a CRT to
another. The seconds of all parts sum to the step's.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from crt_lib import kernels
from crt_lib.audit.accounting import cycle_multiply_adds, multiply_adds, parameters_by_part
from crt_lib.config import ModelConfig
from crt_lib.model import CRT
from crt_lib.runs.machine import wait

OTHER, RECOMPUTED = "other", "recomputation"
PARTS = ("embedding", "attention", "convolution", "MLP", "heads", RECOMPUTED, "optimiser", OTHER)
CONV_PASSES = 5  # over (B, T, d): h in and out; the gradient and h in, the gradient out
ADAMW_BYTES = 40  # a parameter: 4 of the gradient for its norm, 8 to clip it, 28 for the step


class Clock:
    """Charges every moment to one part."""

    def __init__(self, device: str):
        self.device, self.part = device, OTHER
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._held, self._since = False, time.perf_counter()

    def switch(self, part: str, *_: object) -> None:
        """From now on, time is of `part`; what else a module's hook is told is not used."""
        if self._held:
            return
        wait(self.device)
        now = time.perf_counter()
        self.seconds[self.part] += now - self._since
        self._since, self.part = now, part

    @contextlib.contextmanager
    def watch(self, model: CRT) -> Iterator[None]:
        """A context in which the parts of `model` are timed.

        convolution: a cycle's, with its mixing of channels; MLP: the rest of a cycle; heads: what
        is outside of blocks, most of it products with the vocabulary matrix and the losses.
        """
        inside: dict[nn.Module, tuple[str, str]] = {}
        for block in (model.block, *model.prelude):
            inside |= {block: (OTHER, "heads"), block.attention: ("attention", OTHER)}
            inside |= {cycle: ("MLP", OTHER) for cycle in block.trm.cycles}
            inside |= {c.conv: ("convolution", "MLP") for c in block.trm.cycles if c.has_conv}
        hooks: list[Any] = [
            model.embed.register_forward_pre_hook(partial(self.switch, "embedding")),
            model.embed.register_forward_hook(self._embedded),
        ]
        for module, (part, outside) in inside.items():
            enter, leave = (partial(self.switch, to) for to in (part, outside))
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave))
            hooks.append(module.register_full_backward_pre_hook(enter))
            hooks.append(module.register_full_backward_hook(leave))
        frozen = kernels.frozen_running_statistics
        kernels.frozen_running_statistics = partial(self._recomputing, frozen)
        try:
            yield
        finally:
            kernels.frozen_running_statistics = frozen
            for hook in hooks:
                hook.remove()

    def _embedded(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.switch(OTHER)
        if output.requires_grad:  # as the ids do not
            output.register_hook(partial(self.switch, "embedding"))

    @contextlib.contextmanager
    def _recomputing(self, frozen: Any, module: nn.Module) -> Iterator[None]:
        """`frozen`, the context of a recomputation, with its time apart."""
        part = self.part
        self.switch(RECOMPUTED)
        self._held = True
        try:
            with frozen(module):
                yield
        finally:  # torch ends a recomputation by an exception where it has all it needs
            self._held = False
            self.switch(part)


def part_bounds(
    config: ModelConfig, rows: int, seq_len: int, peak: float, bandwidth: float
) -> dict[str, float]:
    """Seconds that each part of a step takes at least, by part of PARTS.

    Products: six FLOPs a multiply-add of the forward pass at `peak` FLOP/s. The depthwise
    convolution and AdamW with the clipping before it: their bytes, in float32, at `bandwidth`
    bytes/s. None for recomputation and other: all they take is lost.
    """
    positions = rows * seq_len
    counts = multiply_adds(config, seq_len)
    cycles = (config.n_prelude + config.n_loops) * config.n_cycles
    cycle = cycle_multiply_adds(config)
    a_product = 6 * positions / peak
    embedding = counts["embedding TRM"] + counts["embedding projection"]
    moved = CONV_PASSES * 4 * positions * config.d_model * cycles if cycle["depthwise"] else 0
    return {
        "embedding": embedding * a_product,
        "attention": counts["attention"] * a_product,
        "convolution": cycles * cycle["convolution"] * a_product + moved / bandwidth,
        "MLP": cycles * cycle["MLP"] * a_product,
        "heads": counts["heads"] * a_product,
        "optimiser": ADAMW_BYTES * sum(parameters_by_part(config).values()) / bandwidth,
    }
