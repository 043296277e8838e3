"""Training (section 3.3): one function for the notebook, the command line and many processes.

Everything random is a function of (seed, update, micro-batch), and the learning rate of the update,
so a run that is killed and resumed ends with the weights and the metrics of one left alone.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crt_lib.checkpoint import (
    RunFolder,
    append_row,
    read_metrics,
    restore,
    save_checkpoint,
)
from crt_lib.config import AnyModelConfig, LanguageModel, TrainConfig, make_model
from crt_lib.data import NOT_SCORED, Batch, make_batches, updates_planned
from crt_lib.device import Precision, check_compiler, check_launch, choose_precision
from crt_lib.evaluate import evaluate
from crt_lib.files import InputError, RunError, locked, stop_signals
from crt_lib.loss import total_loss
from crt_lib.optim import exits_of_update, learning_rate, make_optimizers, random_seed

if TYPE_CHECKING:
    from crt_lib.text.tokenizer import TokenizedCorpus


class TrainingError(RunError):
    """Training cannot go on. The message names the update, the batch and the next step."""


@dataclass(frozen=True)
class TrainResult:
    """A trained model, its run's folder and metrics, and whether all updates were made.

    `is_main` is false in the processes that write nothing.
    """

    model: LanguageModel
    out: Path
    metrics: list[dict[str, Any]]
    finished: bool
    is_main: bool
    processes: int
    precision: Precision


def train(
    model_config: AnyModelConfig,
    train_config: TrainConfig,
    data: "TokenizedCorpus",
    out: str | Path,
    *,
    resume: bool = True,
    progress: bool = True,
    log_with: Sequence[str] = (),
    on_start: Callable[[], None] | None = None,
    losses: Callable[[LanguageModel, Precision], Any] | None = None,
    begin: "LanguageModel | None" = None,
) -> TrainResult:
    """Train a model on `data.train`; the best on `data.valid` at a validation is kept as `best`.

    Writes under `out`: config.json, metrics.jsonl (a row an update: losses in nats a token by exit,
    learning rate, gradient norm; a row a validation), timing.jsonl, and checkpoints/ last, best and
    every kept one. With `resume`, goes on from checkpoints/last; otherwise starts over in `out`.
    SIGTERM and SIGINT save and return with `finished` false. `log_with`: trackers of accelerate,
    such as "tensorboard", that are given the rows of metrics.jsonl too. `on_start` is called by the
    main process when all input is found good and before anything is written. `losses` makes what is
    called instead of the model; `begin` has the weights to begin with, and is trained itself.

    Raises InputError for settings that do not fit each other, the data or the run found in `out`,
    and while another process trains there, before anything is written; TrainingError for a loss or
    gradient that is not finite.
    """
    with contextlib.ExitStack() as held:
        asked = resume, log_with, on_start, held, begin
        run = _Run(model_config, train_config, data, out, *asked)
        if losses:
            run.losses = losses(run.model, run.precision)
        with stop_signals() as stopped:
            finished = run.loop(stopped, progress)
    model = run.accelerator.unwrap_model(run.prepared, keep_fp32_wrapper=False)
    return TrainResult(
        model=model,
        out=run.folder.path,
        metrics=read_metrics(run.folder.path),
        finished=finished,
        is_main=run.is_main,
        processes=run.accelerator.num_processes,
        precision=run.precision,
    )


class _Run:
    def __init__(
        self,
        model_config: AnyModelConfig,
        config: TrainConfig,
        data: "TokenizedCorpus",
        out: str | Path,
        resume: bool,
        log_with: Sequence[str],
        on_start: Callable[[], None] | None,
        held: contextlib.ExitStack,
        begin: "LanguageModel | None",
    ) -> None:
        _check_lengths(model_config, config, data)
        self.config, self.data, self.folder = config, data, RunFolder(out)
        self.batches = make_batches(config, data)
        self.updates = updates_planned(config, self.batches.steps_per_epoch)
        self._earlier = self.folder.earlier() if resume else None
        self._start_processes(model_config, log_with)
        self.record = {
            "model": model_config.to_dict(),
            "train": config.to_dict(),
            "precision": self.precision.name,
            "updates": self.updates,
            "data": data.record(),
        }
        torch.manual_seed(config.seed)
        self.model = (begin or make_model(model_config)).to(self.accelerator.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, config)
        self.state: dict[str, Any] = {"update": 0, "metrics_bytes": 0, "best": None, "scaler": None}
        self._elapsed = 0.0
        if self.is_main:
            held.enter_context(locked(self.folder.path / "run", wait=False))
        self._restore_or_begin(on_start)
        if log_with:
            settings = {name: str(value) for name, value in _flat(self.record).items()}
            try:
                own = {"wandb": {"dir": self.folder.path}}
                self.accelerator.init_trackers("crt", settings, own)
            except Exception as error:  # each has its own
                raise TrainingError(f"{', '.join(log_with)}: {error}; leave it out") from error
            for tracker in self.accelerator.trackers:
                held.callback(tracker.finish)
        if config.compile:
            self.model.compile_block()
        prepared = self.accelerator.prepare(self.model, *self.optimizers)
        self.prepared, *self.prepared_optimizers = prepared
        self.losses: Callable[..., dict[int, torch.Tensor]] = self.prepared
        if self.accelerator.scaler is not None and self.state["scaler"]:
            self.accelerator.scaler.load_state_dict(self.state["scaler"])

    def _start_processes(self, model_config: AnyModelConfig, log_with: Sequence[str]) -> None:
        """Choose the precision, and begin to work with the other processes, if there are any."""
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
            from accelerate.state import AcceleratorState
            from accelerate.tracking import get_available_trackers
        except ImportError as error:
            raise InputError(f"training needs {error.name}; pip install {error.name}") from error
        check_launch()
        names: list[str] = [*log_with] if isinstance(log_with, list | tuple) else [str(log_with)]
        if missing := {*map(str, names)}.difference(map(str, get_available_trackers())):
            raise InputError(f"no tracker {min(missing)!r} here; pip install 'crt-lm[trackers]'")
        config = self.config
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        device = PartialState(cpu=cpu).device
        self.precision = choose_precision(
            config.precision, device, model_config.d_model, config.optimizer
        )
        if config.compile:
            check_compiler(device)
        if self._earlier and config.precision == "auto":
            self.precision = Precision(self._earlier["precision"], "as the run began")
        AcceleratorState._reset_state()  # an earlier run of this process may have had another one
        depth_varies = config.loop_sampling != "none" or bool(config.loop_starts)
        some_unused = config.exits_trained == "one" or depth_varies
        self.accelerator = Accelerator(
            mixed_precision=self.precision.name.replace("fp32", "no"),
            cpu=cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)],
            log_with=names or None,
            project_dir=self.folder.path / "logs",
        )
        self.is_main = self.accelerator.is_main_process
        processes = self.accelerator.num_processes
        if config.grad_accum % processes:
            raise InputError(
                f"grad_accum {config.grad_accum} micro-batches cannot be shared by {processes} "
                f"processes; choose a multiple of {processes}"
            )

    def loop(self, stopped: threading.Event, progress: bool) -> bool:
        from tqdm import tqdm

        done, quiet = self.state["update"], not (progress and self.is_main)
        with tqdm(total=self.updates, initial=done, disable=quiet or None, unit="update") as bar:
            while self.state["update"] < self.updates:
                row, useful, seconds = self._update()
                self._log(row, self._elapsed + seconds, useful / seconds)
                self._elapsed += seconds
                losses = {k: f"{v:.3f}" for k, v in row.items() if k.startswith("loss_")}
                bar.set_postfix(losses | {"tok/s": f"{useful / seconds:.0f}"})
                bar.update()
                update, every = self.state["update"], self.config.eval_every
                last = update == self.updates
                if last or (every and update % every == 0):
                    self._validate()
                stopping = torch.tensor(int(stopped.is_set()), device=self.accelerator.device)
                stop = bool(self.accelerator.reduce(stopping, "sum") > 0)  # any process is told to
                if self.config.keep_every and update % self.config.keep_every == 0:
                    self._save(f"update-{update:06d}")
                if last or stop or update % self.config.checkpoint_every == 0:
                    self._save("last")  # after all that a resumed run would not do again
                if stop and not last:
                    return False
        return True

    def _update(self) -> tuple[dict[str, Any], int, float]:
        """One optimizer update; returns its metrics row, the text tokens seen, and seconds."""
        started = time.perf_counter()
        config, update, accelerator = self.config, self.state["update"], self.accelerator
        share = config.grad_accum // accelerator.num_processes
        rate = learning_rate(update, self.updates, config)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = rate
        exits = exits_of_update(self.model.config.head_loops, update, config, update / self.updates)
        self.prepared.train()
        losses, useful = [], 0
        for i in range(share):
            micro = i * accelerator.num_processes + accelerator.process_index
            step = update * config.grad_accum + micro
            batch = self.batches.batch(*divmod(step, self.batches.steps_per_epoch))
            useful += self._text_tokens(batch)
            torch.manual_seed(random_seed(config.seed, update, micro))
            sync = accelerator.no_sync(self.prepared) if i < share - 1 else contextlib.nullcontext()
            with sync, accelerator.autocast():
                inputs, targets = (x.to(accelerator.device) for x in (batch.inputs, batch.targets))
                by_exit = self.losses(inputs, exits, targets=targets)
                loss = total_loss(by_exit, config.aux_weight)
                accelerator.backward(loss / share)
            losses.append(torch.stack([loss.detach(), *(v.detach() for v in by_exit.values())]))
        gathered = accelerator.gather(torch.stack(losses))  # (micro-batches, 1 + exits)
        self._check_finite(gathered[:, 0], update)
        norm = accelerator.clip_grad_norm_(self.prepared.parameters(), config.clip_norm)
        if accelerator.scaler is None and not torch.isfinite(norm):
            raise TrainingError(self._broken(f"the gradient's norm is {norm.item()}", update))
        for optimizer in self.prepared_optimizers:
            optimizer.step()
            optimizer.zero_grad()
        means = gathered.mean(0).tolist()
        useful = int(accelerator.reduce(torch.tensor(useful, device=accelerator.device), "sum"))
        self.state["update"] = update + 1
        self.state["tokens"] = self.state.get("tokens", 0) + useful
        row = {
            "update": update + 1,
            "tokens": self.state["tokens"],
            "lr": rate,
            "loss": means[0],
            **{f"loss_{k}": v for k, v in zip(by_exit, means[1:], strict=True)},
            "grad_norm": float(norm),
        }
        return row, useful, time.perf_counter() - started

    def _text_tokens(self, batch: Batch) -> int:
        text = batch.targets != NOT_SCORED
        if self.config.batching == "padded":
            text &= batch.targets != self.data.tokenizer.eot_id
        return int(text.sum())

    def _check_finite(self, losses: torch.Tensor, update: int) -> None:
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            process, i = divmod(int(bad[0]), len(losses) // self.accelerator.num_processes)
            micro = i * self.accelerator.num_processes + process
            what = f"the loss is {losses[bad[0]].item()} in micro-batch {micro + 1}"
            raise TrainingError(self._broken(what, update))

    def _broken(self, what: str, update: int) -> str:
        last = self.folder.checkpoint("last")
        kept = f"{last} is as it was" if last.exists() else "no checkpoint was written yet"
        return (
            f"{what} of update {update + 1} (learning rate "
            f"{learning_rate(update, self.updates, self.config):.3g}); {kept}. "
            "Lower max_lr or clip_norm, or use precision fp32, in another folder."
        )

    def _validate(self) -> None:
        """Every process scores the same tokens, so that none waits for the main one."""
        result = evaluate(
            self.model,
            self.data.valid,
            self.data.tokenizer.eot_id,
            seq_len=self.config.seq_len,
            batch_size=max(8, self.config.batch_size),
            max_tokens=self.config.eval_tokens,
        )
        losses = {f"valid_loss_{loop}": loss for loop, loss in result.loss.items()}
        self._log({"update": self.state["update"], "tokens": self.state["tokens"], **losses})
        final = result.loss[self.model.config.n_loops]
        if self.state["best"] is None or final < self.state["best"]:
            self.state["best"] = final
            self._save("best", resumable=False)

    def _log(self, row: dict[str, Any], elapsed: float = 0.0, rate: float = 0.0) -> None:
        if not self.is_main:
            return
        self.state["metrics_bytes"] = append_row(self.folder.metrics, row)
        if elapsed:
            timing = {"update": row["update"], "seconds": elapsed, "tokens_per_second": rate}
            append_row(self.folder.timing, timing)
        self.accelerator.log(row, step=row["update"])

    def _save(self, name: str, resumable: bool = True) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            update = self.state["update"] - 1
            raise TrainingError(self._broken("a weight is not finite at the end", update))
        if self.is_main:
            self.folder.sync()
            if self.accelerator.scaler is not None:
                self.state["scaler"] = self.accelerator.scaler.state_dict()
            state = self.state | {"run": self.record}
            optimizers = self.optimizers if resumable else []
            save_checkpoint(self.folder.checkpoint(name), self.model, state, optimizers)
        self.accelerator.wait_for_everyone()

    def _restore_or_begin(self, on_start: Callable[[], None] | None) -> None:
        """Go on from the last checkpoint in `out`, or make `out` ready for a new run."""
        if self._earlier is not None:
            now = _flat(self.record)
            changed = [
                f"{name} was {earlier!r}, now {now.get(name)!r}"
                for name, earlier in _flat(self._earlier).items()
                if earlier != now.get(name)
            ]
            if changed:
                raise InputError(
                    f"{self.folder.path} holds a run with other settings ({'; '.join(changed)}); "
                    "use another folder, or start over there with resume=False (--fresh)"
                )
            self.state = restore(self.folder.checkpoint("last"), self.model, self.optimizers)
            del self.state["run"]
        if self.is_main:
            if on_start:
                on_start()
            self._elapsed = self.folder.prepare(
                self.record, self.state["update"], self.state["metrics_bytes"]
            )
        self.accelerator.wait_for_everyone()


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The values of a record by name, those of its parts as `part.name`."""
    flat: dict[str, Any] = {}
    for part, value in record.items():
        inner = isinstance(value, dict)
        flat |= {f"{part}.{name}": one for name, one in value.items()} if inner else {part: value}
    return flat


def _check_lengths(model: AnyModelConfig, config: TrainConfig, data: "TokenizedCorpus") -> None:
    """Raise InputError unless the model has the tokenizer's words and positions for a window."""
    if model.vocab_size != data.tokenizer.vocab_size:
        raise InputError(
            f"the model's vocabulary is {model.vocab_size}, the tokenizer's "
            f"{data.tokenizer.vocab_size}; set vocab_size to the tokenizer's"
        )
    if config.seq_len > model.max_seq_len:
        raise InputError(
            f"seq_len {config.seq_len} is longer than max_seq_len "
            f"{model.max_seq_len}; lower train.seq_len or raise model.max_seq_len"
        )
