"""The average of a run's last kept checkpoints, as another checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from crt_lib.checkpoint import RunFolder, load_model, read_state, save_checkpoint
from crt_lib.config import LanguageModel
from crt_lib.files import InputError


def average_models(paths: Sequence[str | Path]) -> LanguageModel:
    """The model whose weights are the means of those of several checkpoints, in evaluation mode.

    Averages of a training's path often score better than its end (Polyak and Juditsky 1992;
    Izmailov et al. 2018, arXiv:1803.05407). Raises InputError as `load_model`, for no checkpoint
    and for checkpoints of different models.
    """
    if not paths:
        raise InputError("there is no checkpoint to average; keep some with train.keep_every")
    mean = load_model(paths[0])
    sums = {name: value.double() for name, value in mean.state_dict().items()}
    for path in paths[1:]:
        model = load_model(path)
        if model.config != mean.config:
            raise InputError(f"{path} is of another model than {paths[0]}")
        for name, value in model.state_dict().items():
            sums[name] += value
    mean.load_state_dict({name: value / len(paths) for name, value in sums.items()})
    return mean


def average_run(out: str | Path, last: int = 5) -> Path:
    """Write the average of a run's last kept checkpoints beside them; the file's path.

    Raises InputError when fewer than `last` were kept.
    """
    folder = RunFolder(out)
    kept = sorted(folder.checkpoint("last").parent.glob("update-*.safetensors"))  # oldest first
    if len(kept) < last:
        raise InputError(
            f"{folder.path} kept {len(kept)} checkpoints, fewer than {last}; "
            "train with --set train.keep_every=<updates>, or average fewer"
        )
    chosen = kept[-last:]
    path = folder.checkpoint("average")
    state = read_state(chosen[-1]) | {"averaged": [p.name for p in chosen]}
    save_checkpoint(path, average_models(chosen), state)
    return path
