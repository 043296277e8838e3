"""The settings of a model and of a training, validated when made."""

import dataclasses
import itertools
import json
import math
import typing
from dataclasses import dataclass
from importlib import import_module
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args, get_origin

from crt_lib.files import InputError

if TYPE_CHECKING:
    from crt_lib.hf.gpt2 import GPT2
    from crt_lib.model import CRT

AnyModelConfig: TypeAlias = "ModelConfig | GPT2Config"
GONE = (("exits_start", 0.0),)  # fields of stored settings that are no more, where they did nothing
LanguageModel: TypeAlias = "CRT | GPT2"  # what a configuration names and a training trains


@dataclass(frozen=True)
class Settings:
    """What the frozen settings share: JSON, changed copies, and checks of the fields' types."""

    def replace(self, **changes: Any) -> Self:
        """A validated copy with `changes`; raises InputError for an unknown field."""
        return self.from_dict(vars(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as `from_dict` takes them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`; raises InputError for unknown fields and bad values."""
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: of for name, of in values.items() if (name, of) not in GONE}
        for name in values:
            if name not in names:
                raise InputError(f"{cls.__name__} has no field {name!r}; it has {', '.join(names)}")
        return cls(**{k: _tuple(v) for k, v in values.items()})

    def _check_types(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    allowed = ", ".join(map(repr, get_args(kind)))
                    raise InputError(f"{name} is {value!r}; choose one of {allowed}")
            elif not _fits(value, kind):
                wanted = getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind)
                raise InputError(f"{name} is {value!r}; it must be of type {wanted}")

    def _check_at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} is {value}; it must be at least {least}")

    def _check_fraction(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} is {value}; it must be in [0, 1)")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    options = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, option) for option in options)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_heads(config: AnyModelConfig) -> None:
    if config.d_model % config.n_heads:
        raise InputError(
            f"d_model {config.d_model} is not divisible by n_heads {config.n_heads}; "
            "choose a divisor of d_model"
        )


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The architecture. Defaults are Table 1 of the paper, made causal (92,053,760 parameters).

    The fields from `residual` on are departures from the paper; those without a source are this
    project's. Each can be changed alone.
    """

    maker = "crt_lib.model:CRT"  # what `make_model` calls

    vocab_size: int = 50_257  # GPT-2 BPE
    d_model: int = 512
    n_heads: int = 8
    n_loops: int = 8  # applications of the one block
    n_cycles: int = 8  # TRM cycles in the block
    n_embed_cycles: int = 3  # TRM cycles that refine the embedding
    kernel_size: int = 3
    dilations: tuple[int, ...] = (1, 2, 4, 8)  # cycle i uses dilations[i % len(dilations)]
    mlp_ratio: int = 4  # MLP width / d_model
    max_seq_len: int = 1024
    exit_loops: tuple[int, ...] = (2, 4, 6)  # intermediate heads; the last loop always has one
    head_sharing: Literal["separate", "shared_aux", "tied"] = "shared_aux"
    trm: Literal["depthwise_mlp", "linear", "conv", "conv_linear", "depthwise"] = "depthwise_mlp"
    norm: Literal["layer", "rms", "batch", "none"] = "layer"
    share_cycle_weights: bool = False  # True: the cycles of a TRM are one cycle, repeated
    causal: bool = True  # False: convolutions pad on both sides and see the future, as released
    dropout: float = 0.1  # of what attention, convolution and cycle return
    # "pre" normalises what a branch reads, not the sum (Xiong et al. 2020, arXiv:2002.04745)
    residual: Literal["post", "pre"] = "post"
    # "scaled": N(0, 0.02), what is added to the stream divided by sqrt(its additions) (GPT-2,
    # Radford et al. 2019); depthwise kernels begin as the identity (ReZero's argument, 2003.04887)
    init: Literal["torch", "scaled"] = "torch"
    conv_after_norm: bool = False  # the cycle's convolution reads the normalised stream
    # False: the depthwise convolution alone, no gelu and no mixing after it (a full convolution has
    # neither)
    pointwise: bool = True
    # "swiglu" has 2/3 of the width, so as many weights (Shazeer 2020, arXiv:2002.05202)
    activation: Literal["gelu", "swiglu"] = "gelu"
    positions: Literal["learned", "rotary"] = "learned"  # rotary: Su et al. 2021, arXiv:2104.09864
    # the embedding again at each loop, by a learned gain a feature that begins at 0 ("recall",
    # Bansal et al. 2022, arXiv:2202.05826)
    injection: bool = False
    n_prelude: int = 0  # blocks of their own weights before the loop (Huginn, arXiv:2502.05171)
    # token embedding width; None: d_model // 2 (eq. 1). As wide as the model and tied, it is the
    # heads too (Press and Wolf 2017, arXiv:1608.05859)
    embed_dim: int | None = None
    exit_norm: bool = False  # a norm of its own before each head, as GPT-2 has before its one
    attention_dropout: float | None = None  # of attention's weights; None: as `dropout`
    embed_dropout: float = 0.0  # of the embedding that enters the loop (GPT-2 has it)
    conv_noise: float = 0.0  # standard deviation added to depthwise kernels that begin as identity

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(1, "vocab_size", "n_heads", "n_loops", "n_cycles", "mlp_ratio")
        self._check_at_least(1, "max_seq_len", "embed_dim")
        self._check_at_least(0, "n_embed_cycles", "n_prelude", "conv_noise")
        self._check_at_least(2, "d_model")
        self._check_fraction("dropout", "embed_dropout", "attention_dropout")
        _check_heads(self)
        if self.d_model % 2:
            raise InputError(f"d_model is {self.d_model}; it must be even: embeddings are d/2 wide")
        if self.positions == "rotary" and (self.d_model // self.n_heads) % 2:
            raise InputError(
                f"rotary positions turn pairs of features; d_model / n_heads is "
                f"{self.d_model // self.n_heads}, make it even"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise InputError(f"kernel_size is {self.kernel_size}; it must be odd and positive")
        if not self.dilations or min(self.dilations) < 1:
            raise InputError(f"dilations are {self.dilations}; give one or more positive integers")
        for loop in self.exit_loops:
            if not 1 <= loop <= self.n_loops:
                raise InputError(f"exit loop {loop} is outside 1..{self.n_loops}")
        if list(self.exit_loops) != sorted(set(self.exit_loops) - {self.n_loops}):
            raise InputError(
                f"exit_loops are {self.exit_loops}; give increasing loops below the last "
                f"({self.n_loops}), which always has a head"
            )

    @property
    def embedding_width(self) -> int:
        """Features of the token embedding, and of what a tied head multiplies it with."""
        return self.d_model // 2 if self.embed_dim is None else self.embed_dim

    @property
    def head_loops(self) -> tuple[int, ...]:
        """Every loop with a head, the last one included."""
        return (*self.exit_loops, self.n_loops)


@dataclass(frozen=True)
class GPT2Config(Settings):
    """A GPT-2 of transformers (Radford et al. 2019), the baseline; its loops are its layers.

    `kind`: what a stored configuration is of; "shared" is one layer applied `n_layers` times.
    """

    maker = "crt_lib.hf.gpt2:GPT2"  # by name: the core's one way into a room

    vocab_size: int = 50_257
    d_model: int = 768
    n_heads: int = 12
    n_layers: int = 12
    max_seq_len: int = 1024
    dropout: float = 0.1
    kind: Literal["gpt2", "shared"] = "gpt2"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(1, "vocab_size", "d_model", "n_heads", "n_layers", "max_seq_len")
        self._check_fraction("dropout")
        _check_heads(self)

    @property
    def n_loops(self) -> int:
        """Its layers, so that its one exit has the name the training looks for."""
        return self.n_layers

    @property
    def head_loops(self) -> tuple[int, ...]:
        """The one exit, after the last layer."""
        return (self.n_layers,)


def config_from_dict(values: dict[str, Any]) -> AnyModelConfig:
    """The model's configuration that `to_dict` wrote, of either kind."""
    kind = GPT2Config if "kind" in values else ModelConfig
    return kind.from_dict(values)


@typing.overload
def make_model(config: ModelConfig) -> "CRT": ...
@typing.overload
def make_model(config: GPT2Config) -> "GPT2": ...
def make_model(config: AnyModelConfig) -> LanguageModel:
    """The model that a configuration names, freshly initialised: a `CRT`, or a baseline that takes
    the same ids and gives the same outputs.
    """
    module, name = config.maker.split(":")
    return getattr(import_module(module), name)(config)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a model is trained. Defaults are section 3.3 of the paper, on packed windows."""

    batching: Literal["packed", "padded"] = "packed"  # packed windows (honest) or padded lines
    seq_len: int = 384  # positions a row
    batch_size: int = 2  # rows a micro-batch
    grad_accum: int = 8  # micro-batches an update, over all processes
    updates: int | None = None  # optimizer updates; None: as many as `epochs` need
    epochs: float = 10.0
    max_lr: float = 3e-4  # OneCycleLR, cosine
    warmup: float = 0.05  # share of the updates
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    aux_weight: float = 0.3  # lambda of eq. 5
    # "one": an update trains one intermediate exit, drawn anew, with all of lambda: the same
    # expectation for less work
    exits_trained: Literal["all", "one"] = "all"
    # how many loops an update runs: all, uniform in 1..n_loops, or log-normal Poisson (Huginn,
    # Geiping et al. 2025, arXiv:2502.05171) with mean n_loops, cut at n_loops
    loop_sampling: Literal["none", "uniform", "poisson"] = "none"
    # shares of the updates after which loop 2, 3, ... begins; loops beyond them begin with the last
    loop_starts: tuple[float, ...] = ()
    # "muon": Muon for the matrices inside the model (Jordan et al. 2024), with AdamW's step size
    # (Liu et al. 2025, arXiv:2502.16982); AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    eval_every: int = 200  # updates between validations (0: only at the end)
    eval_tokens: int | None = None  # tokens of valid that choose `best`; None: all of it
    checkpoint_every: int = 200  # updates between writes of `last`
    keep_every: int = 0  # updates between checkpoints that are kept for good (0: none)
    seed: int = 0
    origin: str = ""  # of the weights it began with and of what else it learned from, if any

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(2, "seq_len")
        self._check_at_least(1, "batch_size", "grad_accum", "updates")
        self._check_at_least(1, "checkpoint_every", "eval_tokens")
        self._check_at_least(0, "weight_decay", "eval_every", "keep_every", "seed")
        self._check_fraction("warmup")
        if not all(0 <= a <= b < 1 for a, b in itertools.pairwise((0.0, *self.loop_starts))):
            raise InputError(f"loop_starts are {self.loop_starts}; give rising shares in [0, 1)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}; give two numbers in [0, 1)")
        for name in ("epochs", "max_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive, finite")
        if not 0 <= self.aux_weight <= 1:
            raise InputError(f"aux_weight is {self.aux_weight}; it must be in [0, 1]")
