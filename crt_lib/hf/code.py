"""The code that a saved model's folder carries, so that it loads without crt_lib."""

import re
from pathlib import Path

_OURS = re.compile(r"^(\s*from )(crt_lib)?\.([\w.]+)(?= import)", re.MULTILINE)


def folder_code(main: str, here: Path) -> dict[str, str]:
    """The module in the file `here`, as `main`, and those of crt_lib it needs, as a folder's own.

    Texts by name: `crt_lib.a.b` is `a_b` there. `here` may lie in such a folder itself.
    """
    texts: dict[str, str] = {}
    waiting = {main: here}
    while waiting:
        name, path = waiting.popitem()
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\nif TYPE_CHECKING:\n(    .*\n)+", "", text)
        texts[name] = _OURS.sub(lambda found: f"{found[1]}.{found[3].replace('.', '_')}", text)
        for _, package, module in _OURS.findall(text):
            inside = here.parents[1] / f"{module.replace('.', '/')}.py"
            needed = module.replace(".", "_")
            if needed not in texts:
                waiting[needed] = inside if package else here.with_name(f"{needed}.py")
    return texts
