"""What a saved model has beside its weights, here and on the hub: its code, and its card."""

import re
from pathlib import Path
from typing import Any

from crt_lib.files import InputError, write_text

MAIN = "modeling_crt"  # the model's module in a saved folder
OURS = re.compile(r"^(\s*from )(crt_lib)?\.([\w.]+)(?= import)", re.MULTILINE)
CARD = "README.md"
_KINDS = ["*.json", "*.safetensors", "*.py", CARD]
_REPO = ("private", "token")  # how the hub calls what it is given
_COMMIT = ("commit_message", "commit_description", "token", "revision", "create_pr")
OPTIONS = {"repo_id", "tags", *_REPO, *_COMMIT}


def write_code(here: Path, folder: Path) -> None:
    """Write the module in the file `here`, and those of crt_lib it needs, into a saved `folder`.

    `crt_lib.a.b` is `a_b` there. `here` may lie in such a folder itself.
    """
    waiting, written = {MAIN: here}, set[str]()
    while waiting:
        name, path = waiting.popitem()
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\nif TYPE_CHECKING:\n(    .*\n)+", "", text)
        for _, package, module in OURS.findall(text):
            inside = here.parents[1] / f"{module.replace('.', '/')}.py"
            needed = module.replace(".", "_")
            waiting[needed] = inside if package else here.with_name(f"{needed}.py")
        text = OURS.sub(lambda found: f"{found[1]}.{found[3].replace('.', '_')}", text)
        write_text(folder / f"{name}.py", text)
        written.add(name)
        waiting = {name: path for name, path in waiting.items() if name not in written}


def card_text(model: Any, name: str, said: str, **data: Any) -> str:
    """A card: what the hub reads of it, with `data`, and what is `said` beside its sizes."""
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["early-exit", "recursive", "custom_code"],
        **data,
    )
    config = model.config
    exits = ", ".join(map(str, (*config.exit_loops, config.n_loops)))
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"---\n{about.to_yaml()}\n---\n\n# {name}\n\nA CRT: one block, looped {config.n_loops} "
        f"times, with a prediction head after loop {exits}; {parameters:,} parameters.\n{said}\n"
    )


def write_card_if_none(model: Any, folder: Path, name: str, tags: list[str] | None = None) -> None:
    """Write `folder`/README.md unless it is there: of the folder the model was loaded from."""
    from huggingface_hub import ModelCard

    known = (folder / CARD, Path(getattr(model.config, "_name_or_path", "") or "nowhere") / CARD)
    if path := next((path for path in known if path.is_file()), None):
        text = path.read_text(encoding="utf-8")
    else:
        loads = "`AutoModelForCausalLM.from_pretrained(NAME, trust_remote_code=True)` loads it."
        text = card_text(model, name.rpartition("/")[2], loads)
    if tags:
        card = ModelCard(text)
        about: Any = card.data
        about.tags = list(dict.fromkeys([*(about.get("tags") or ()), *tags]))
        text = str(card)
    write_text(folder / CARD, text)


def upload(folder: Path, options: dict[str, Any]) -> Any:
    """What the hub says of a commit of `folder`'s own files. Raises InputError where it cannot."""
    from huggingface_hub import HfApi

    api = HfApi()
    named = options.get("repo_id") or folder.resolve().name
    given = {key: value for key, value in options.items() if value is not None}
    try:
        made = api.create_repo(
            named, exist_ok=True, **{key: given[key] for key in _REPO if key in given}
        )
        return api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=_KINDS,
            ignore_patterns=["*/*"],
            **{key: given[key] for key in _COMMIT if key in given},
        )
    except Exception as error:  # of the network, or of the hub: each library has its own
        why = " ".join(str(error).split())
        raise InputError(
            f"{named} cannot be uploaded ({why}); save to a folder, and `hf upload {named} FOLDER` "
            "from where the hub can be reached"
        ) from error
