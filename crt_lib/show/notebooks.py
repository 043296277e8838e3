"""Tables about the notebooks, their questions, times and ways in, and about the stored files."""

import json
import re
from pathlib import Path

import pandas as pd

from crt_lib.files import InputError, write_rows
from crt_lib.runs.manifest import read_manifest
from crt_lib.show.address import Address
from crt_lib.show.markdown import cells, table
from crt_lib.study.made import provenance, read_list


def record_times(run: Path, results: Path) -> None:
    """Write results/notebooks.csv: what each notebook of a finished `crt reproduce` took.

    Raises InputError where a notebook is not done.
    """
    entries = read_manifest(run, run.name).get("notebooks", {})
    if not entries or any(entry["status"] != "done" for entry in entries.values()):
        raise InputError(f"{run} has no finished run of the notebooks; `crt reproduce` first")
    rows = []
    for name, entry in entries.items():
        environment = entry["environment"]
        row = {"notebook": name, "profile": run.name, "seconds": entry["seconds"]}
        row |= {"peak_memory_bytes": entry["peak_memory_bytes"], "device": environment["device"]}
        rows.append(row | {"cpu_count": environment["cpu_count"]})
    write_rows(results / "notebooks.csv", rows)


def notebook_table(results: Path) -> str:
    """Each notebook's question, as it says it, and what it took in `crt reproduce`."""
    took = pd.read_csv(results / "notebooks.csv").set_index("notebook")
    asked = {}
    for path in sorted((results.parent / "notebooks").glob("[0-9]*.ipynb")):
        text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        question = re.search(r"\*\*Question\.\*\* (.*?)\n\n", text + "\n\n", re.DOTALL)
        asked[path.stem] = " ".join(question[1].split()) if question else ""
    first = took.iloc[0]
    where = f"{first['profile']}, {first['device']}, {first['cpu_count']} cores"
    made = pd.DataFrame({"question": asked, where: cells(took["seconds"], "{:.0f} s")})
    made.insert(0, "notebook", [f"[{name}](notebooks/{name}.ipynb)" for name in made.index])
    return table(made)


LESSONS = {  # of a course: lesson -> its notebooks
    "text and model": ("01", "02"),
    "training and the leak": ("03", "08"),
    "loops and exits": ("04", "07"),
    "what earns its place": ("05", "06", "09", "10"),
}


def lessons(results: Path) -> str:
    """A course: each lesson's notebooks, their exercises by number, and how long they run.

    Raises InputError where a notebook has no exercise.
    """
    took = pd.read_csv(results / "notebooks.csv").set_index("notebook")["seconds"]
    rows = []
    for number, (lesson, heads) in enumerate(LESSONS.items(), start=1):
        links, exercises, seconds = [], [], 0.0
        for head in heads:
            (path,) = (results.parent / "notebooks").glob(f"{head}_*.ipynb")
            cells_of = json.loads(path.read_text(encoding="utf-8"))["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells_of)
            found = re.findall(r"\*\*Exercise (\d+)\.\*\*", text)
            if not found:
                raise InputError(f"{path} has no **Exercise N.**, and is part of a lesson")
            links.append(f"[{head}](notebooks/{path.name})")
            exercises.append(f"{head}: {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''}")
            seconds += took[path.stem]
        row = {"lesson": f"{number}. {lesson}", "read and run": ", ".join(links)}
        rows.append(row | {"exercises": "; ".join(exercises), "runs": f"{seconds:.0f} s"})
    return table(pd.DataFrame(rows))


def ways_in(results: Path) -> str:
    """Three ways to begin, with the time and memory of the two that were measured."""
    took = pd.read_csv(results / "notebooks.csv")
    ours = pd.read_csv(results / "bench" / "train.csv").iloc[1]
    colab = f"[01_data]({Address.read(results.parent).colab('01_data')})"
    minutes, cores = took["seconds"].sum() / 60, took["cpu_count"][0]
    step = f"{ours['rows']} x {ours['seq_len']} tokens, on a CPU"
    gpu = "`crt train --profile paper --corpus wikitext-2 --vram-limit 6`"
    return f"""| way | do | time | memory |
| --- | --- | --- | --- |
| Colab | open {colab}, run all; the next is linked at its end | as below | as below |
| laptop | `make reproduce` | {minutes:.0f} minutes on {cores} cores, and a few of installation | \
{took["peak_memory_bytes"].max() / 1e9:.1f} GB |
| GPU | {gpu} | not measured yet | {ours["peak_memory_bytes"] / 1e9:.1f} GB: {step} |"""


def files(results: Path) -> str:
    """What stands under results/, and the command that makes it: results/made.csv as a table.

    Of a run also the update whose weights are scored, and the code that trained it.
    """
    made = pd.DataFrame(read_list(results))
    paths = made.groupby("command", sort=False)["path"].agg(
        lambda mine: ", ".join(f"`{path}`" for path in dict.fromkeys(mine))
    )
    minutes = made.groupby("command", sort=False)["minutes"].max()
    commands = [f"`{command}`" for command in paths.index]
    shown = {"file or run": paths, "command": commands, "minutes, about": cells(minutes, "{:g}")}
    first = made.groupby("command", sort=False)["path"].first()
    found = first.map(lambda path: provenance(results / path))
    shown |= {"weights scored, update": found.str[0], "trained by": found.str[1]}
    said = "`modified`: of a checkout with changes that were in no commit."
    return f"{table(pd.DataFrame(shown))}\n\n{said}"
