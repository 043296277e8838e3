"""The code that a saved model's folder carries, so that it loads without crt_lib."""

import re
from pathlib import Path


def folder_code(main: str, here: Path) -> dict[str, str]:
    """The module in the file `here`, as `main`, and those of crt_lib it needs, as a folder's own.

    Texts by name: `crt_lib.a.b` is `a_b` there. `here` may lie in such a folder itself.
    """
    pattern = re.compile(r"^(\s*from )(crt_lib)?\.([\w.]+)( import)", re.MULTILINE)

    def flat(found: re.Match[str]) -> str:
        return found[3].replace(".", "_")

    texts: dict[str, str] = {}
    waiting = [(main, here)]
    while waiting:
        name, path = waiting.pop()
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\nif TYPE_CHECKING:\n(    .*\n)+", "", text)
        for found in pattern.finditer(text):
            needed = flat(found)
            if needed in texts or needed == name:
                continue
            if found[2]:
                where = here.parents[1] / f"{found[3].replace('.', '/')}.py"
            else:
                where = here.with_name(f"{needed}.py")
            waiting.append((needed, where))
        texts[name] = pattern.sub(lambda found: f"{found[1]}.{flat(found)}{found[4]}", text)
    return texts
