"""A run that goes on from another's weights, its exits learning from teachers too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from crt_lib.config import TrainConfig, make_model
from crt_lib.exits.distil import PROMPT, DistilledLosses
from crt_lib.files import InputError, sha256
from crt_lib.model import CRT
from crt_lib.runs.profiles import Profile
from crt_lib.runs.run import Run, run_profile
from crt_lib.runs.trained import as_crt, find_checkpoint, load_trained_model

SHORT = {"updates": 300, "batch_size": 8, "max_lr": 1e-3}


def distil_run(
    run: str | Path,
    out: str | Path,
    *,
    teachers: Sequence[str | Path] = (),
    share: float = 1.0,
    written: bool = False,
    settings: dict[str, Any] | None = None,
    **how: Any,
) -> Run | Literal["not the main process"] | None:
    """Train the model of `run` on, its exits towards `teachers`; what `run_profile` returns.

    `share` and `written`: as in `DistilledLosses`. `teachers`: runs or checkpoints, by default the
    one it begins with, as it was. `settings`: of the training, instead of those it had and of
    SHORT. Every exit weighs the same, in every update, and nothing is dropped out: a teacher's
    word needs no noise. `how`: as in `run_profile`.

    Raises InputError as `run_profile`, and for a run that is no CRT, a teacher with another
    tokenizer, a share outside [0, 1], rows too short to write, and `out` where a model is.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share is {share}; it must be in [0, 1]")
    path, told = find_checkpoint(run), [find_checkpoint(t) for t in teachers or (run,)]
    if any(Path(out).resolve() in file.resolve().parents for file in (path, *told)):
        raise InputError(f"{out} holds a model that this begins with; give another folder")
    (model, tokenizer, trained), *others = map(_crt, (path, *told))
    for file, (_, own, _) in zip(told, others, strict=True):
        if own.fingerprint != tokenizer.fingerprint:
            raise InputError(f"{file} has another tokenizer than the model; a teacher has the same")
    taught_by = [teacher.requires_grad_(False) for teacher, _, _ in others]
    digests = ", ".join(sha256(file.read_bytes())[:12] for file in told)
    origin = f"{sha256(path.read_bytes())[:12]}, taught by {digests}, share {share:g}"
    origin += ", of text that they write" * written
    every: dict[str, Any] = {"exits_trained": "all", "loop_sampling": "none", "loop_starts": ()}
    every["aux_weight"] = 1 - 1 / len(model.config.head_loops)
    given = every | SHORT | (settings or {}) | {"origin": origin}
    config = TrainConfig.from_dict(trained["train"]).replace(**given)
    if written and config.seq_len <= PROMPT:
        raise InputError(
            f"of rows of {config.seq_len} tokens teachers are given {PROMPT}; use more"
        )
    begun = make_model(model.config.replace(dropout=0.0, embed_dropout=0.0, attention_dropout=None))
    begun.load_state_dict(model.state_dict())
    data = trained["data"]
    profile = Profile("distilled", data["corpus"], data["tokenizer"], begun.config, config, "crt2")
    how |= {"losses": lambda m, _: DistilledLosses(m, taught_by, share, written)}
    return run_profile(profile, out, begin=begun, **how)


def _crt(path: Path) -> tuple[CRT, Any, dict[str, Any]]:
    model, tokenizer, trained = load_trained_model(path)
    return as_crt(model, path), tokenizer, trained
