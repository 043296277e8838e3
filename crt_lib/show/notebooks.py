"""Blocks about the notebooks, their questions, times and ways in, and about the stored files."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from crt_lib.files import InputError, write_rows
from crt_lib.runs.manifest import read_manifest
from crt_lib.show.address import Address
from crt_lib.show.templates import render
from crt_lib.study.doctor import update_seconds
from crt_lib.study.made import provenance, read_list

LESSONS = {  # of a course: lesson -> its notebooks
    "text and model": ("01", "02"),
    "training and the leak": ("03", "08"),
    "loops and exits": ("04", "07"),
    "what earns its place": ("05", "06", "09", "10"),
}


def record_times(run: Path, results: Path) -> None:
    """Write results/notebooks.csv: what each notebook of a finished `crt reproduce` took.

    `ended`: seconds of the whole until it ended, without those in which none ran. Beside them is
    what an update takes here and now (`update_seconds`). Raises InputError where a notebook is not
    done.
    """
    entries = read_manifest(run, run.name).get("notebooks", {})
    if not entries or any(entry["status"] != "done" for entry in entries.values()):
        raise InputError(f"{run} has no finished run of the notebooks; `crt reproduce` first")
    frame = pd.DataFrame.from_dict(entries, orient="index")
    frame = frame.sort_values("started", kind="stable")
    began, finished = (pd.to_datetime(frame[at]) for at in ("started", "finished"))
    idle = (began - finished.cummax().shift()).clip(pd.Timedelta(0)).fillna(pd.Timedelta(0))
    ended = (finished - began.iloc[0] - idle.cumsum()).dt.total_seconds()
    pace = round(update_seconds("auto"), 4)
    rows = [
        {"notebook": name, "profile": run.name, "seconds": entry["seconds"], "ended": ended[name]}
        | {"peak_memory_bytes": entry["peak_memory_bytes"]}
        | {column: entry["environment"][column] for column in ("device", "isa", "cpu_count")}
        | {"update_seconds": pace}
        for name, entry in sorted(entries.items())
    ]
    write_rows(results / "notebooks.csv", rows)


def notebook_table(results: Path) -> str:
    """Each notebook's question, as it says it, and what it took in `crt reproduce`."""
    took = pd.read_csv(results / "notebooks.csv").set_index("notebook")
    asked = {}
    for path in sorted((results.parent / "notebooks").glob("[0-9]*.ipynb")):
        question = re.search(r"\*\*Question\.\*\* (.*?)\n\n", _text(path), re.DOTALL)
        asked[path.stem] = " ".join(question[1].split()) if question else ""
    return render("notebooks", asked=asked, seconds=took["seconds"], first=took.iloc[0])


def _text(notebook: Path) -> str:
    """The source of all cells."""
    sources = [cell["source"] for cell in json.loads(notebook.read_text("utf-8"))["cells"]]
    return "\n\n".join("".join(source) for source in sources)


def lessons(results: Path) -> str:
    """A course: each lesson's notebooks, their exercises by number, and how long they run.

    Raises InputError where a notebook has no exercise.
    """
    took = pd.read_csv(results / "notebooks.csv").set_index("notebook")["seconds"]

    def notebook(head: str) -> dict[str, Any]:
        (path,) = (results.parent / "notebooks").glob(f"{head}_*.ipynb")
        found = re.findall(r"\*\*Exercise (\d+)\.\*\*", _text(path))
        if not found:
            raise InputError(f"{path} has no **Exercise N.**, and is part of a lesson")
        about = {"name": path.stem, "seconds": took[path.stem]}
        return about | {"first": found[0], "last": found[-1]}

    return render(
        "lessons", lessons={name: list(map(notebook, heads)) for name, heads in LESSONS.items()}
    )


def ways_in(results: Path) -> str:
    """Three ways to begin, with the time and memory of the two that were measured."""
    return render(
        "ways",
        took=pd.read_csv(results / "notebooks.csv"),
        step=pd.read_csv(results / "bench" / "train.csv").iloc[1],
        address=Address.read(results.parent),
    )


def files(results: Path) -> str:
    """What stands under results/, and the command that makes it: results/made.csv as a table.

    Of a run also the update whose weights are scored, and the code that trained it.
    """
    made = pd.DataFrame(read_list(results))
    return render("files", made=made, results=results, provenance=provenance)
