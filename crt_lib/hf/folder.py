"""The code that a saved folder has beside its weights: the modules of a model, as files there."""

import re
from pathlib import Path

MAIN = "modeling_crt"  # the model's module in such a folder
OURS = re.compile(r"^(\s*from )(crt_lib)?\.([\w.]+)(?= import)", re.MULTILINE)


def folder_code(here: Path) -> dict[str, str]:
    """The module in the file `here`, and those of crt_lib it needs, as a saved folder's own.

    Texts by name: `crt_lib.a.b` is `a_b` there. `here` may lie in such a folder itself.
    """
    texts: dict[str, str] = {}
    waiting = {MAIN: here}
    while waiting:
        name, path = waiting.popitem()
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\nif TYPE_CHECKING:\n(    .*\n)+", "", text)
        texts[name] = OURS.sub(lambda found: f"{found[1]}.{found[3].replace('.', '_')}", text)
        for _, package, module in OURS.findall(text):
            inside = here.parents[1] / f"{module.replace('.', '/')}.py"
            needed = module.replace(".", "_")
            if needed not in texts:
                waiting[needed] = inside if package else here.with_name(f"{needed}.py")
    return texts
