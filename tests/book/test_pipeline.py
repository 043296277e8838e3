"""The pipeline, on tiny notebooks that really run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tiny_notebooks import LOG, PARAMETERS, log, run, write_notebook
from waiting import wait_for

from crt_lib.book import pipeline
from crt_lib.book.notebooks import Notebook, convert, find_notebooks
from crt_lib.book.pipeline import reproduce
from crt_lib.book.task import NotebookError
from crt_lib.files import InputError
from crt_lib.runs.manifest import read_manifest, update_manifest


def write_pair(folder: Path) -> None:
    """01 counts its runs in log.txt; 02 too, unless a file `fault` lies in the results."""
    write_notebook(
        folder,
        "01_first",
        LOG + "print(f'first {profile} {width} {names}', file=log, flush=True)",
        parameters=PARAMETERS + "width: int = 3  # a size\nnames: list[str] = []",
    )
    write_notebook(
        folder,
        "02_second",
        LOG + "if (Path(results) / 'fault').exists():\n    raise ValueError('a fault: 42')",
        "print('second', rate, file=log, flush=True)",
        parameters=PARAMETERS + "rate: float = 0.5",
    )


def test_runs_in_order_and_continues_after_a_failure(tmp_path, monkeypatch):
    folder, out = tmp_path / "notebooks", tmp_path / "a {odd} folder" / "smoke"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crt_lib.book.task.library_sha256", lambda: "before")
    write_pair(folder)
    given = {"width": "7", "rate": 2, "names": "['a']"}
    out.mkdir(parents=True)
    (out / "fault").touch()
    (left := out / ".manifest.json.ab12.tmp").touch()  # by a process that was killed
    update_manifest(out, "smoke", train={"status": "done"})
    assert not left.exists()
    (out / "paper").mkdir()
    (out / "paper" / "results.csv").write_text(
        "exit,tokens,token_ppl\n2,1200,31.25681\nfinal,1200,30.0\n"
    )

    with pytest.raises(NotebookError) as caught:
        run(folder, out, parameters=given)
    message = str(caught.value)
    assert "notebook 02_second failed in cell 2: from pathlib import Path" in message
    assert "ValueError: a fault: 42" in message
    assert "the same command goes on" in message
    assert (out / "notebooks" / "02_second.failed.ipynb").is_file()
    assert not (out / "notebooks" / "02_second.ipynb").exists()
    assert read_manifest(out)["notebooks"]["02_second"]["error"]
    assert log(out) == ["first smoke 7 ['a']"]

    (out / "fault").unlink()
    lines = run(folder, out, parameters=given)
    assert "01_first" in lines[0] and "skipped" in lines[0]
    assert "02_second" in lines[1] and "MiB" in lines[1]
    assert "31.26" in lines[2] and "final" in lines[2]
    assert log(out) == ["first smoke 7 ['a']", "second 2.0"]
    names = {path.name for path in (out / "notebooks").glob("[!.]*")}
    assert names == {f"{n}{s}" for n in ("01_first", "02_second") for s in (".ipynb", ".html")}

    record = json.loads((out / "manifest.json").read_text())
    assert record["train"] == {"status": "done"} and record["profile"] == "smoke"
    first = record["notebooks"]["01_first"]
    assert first["environment"]["versions"]["torch"]
    assert first["parameters"] == {"profile": "smoke", "width": 7, "names": ["a"]}
    assert first["status"] == "done" and first["seconds"] > 0
    assert first["peak_memory_bytes"] > 2**20 and first["finished"] >= first["started"]
    assert str(tmp_path) not in json.dumps(record)

    # Outputs do not make a notebook another one; a changed cell does, and only that one reruns.
    second = json.loads((folder / "02_second.ipynb").read_text())
    second["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "old"}]
    (folder / "02_second.ipynb").write_text(json.dumps(second))
    assert all("skipped" in line for line in run(folder, out, parameters=given)[:2])
    second["cells"][2]["source"] = "print('changed', file=log, flush=True)"
    (folder / "02_second.ipynb").write_text(json.dumps(second))
    run(folder, out, parameters=given)
    assert log(out)[2:] == ["changed"]

    run(folder, out, only=["first"], parameters={"width": 4})
    run(folder, out, only=["01"], parameters={"width": 4}, fresh=True)
    monkeypatch.setattr("crt_lib.book.task.library_sha256", lambda: "after")
    run(folder, out, only=["01_first.ipynb"], parameters={"width": 4})
    assert log(out)[3:] == ["first smoke 4 []"] * 3


def test_continues_after_sigkill(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "smoke"
    write_notebook(folder, "01_first", LOG + "print('first', file=log, flush=True)")
    write_notebook(
        folder,
        "02_second",
        LOG + "print('second', file=log, flush=True)",
        "import os, sys, time\n"
        "print(sys.executable, file=log, flush=True)\n"
        "while not (Path(results) / 'go').exists():\n    time.sleep(0.05)",
    )
    code = (
        "import sys; from pathlib import Path; from crt_lib.book.pipeline import reproduce\n"
        "reproduce('smoke', notebooks_dir=Path(sys.argv[1]), out=Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)])
    try:
        wait_for(lambda: (out / "log.txt").exists() and sys.executable in log(out))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert read_manifest(out)["notebooks"]["02_second"]["status"] == "running"
    assert not (out / "notebooks" / "02_second.ipynb").exists()

    (out / "go").touch()
    run(folder, out)
    assert log(out) == ["first", *["second", sys.executable] * 2]
    names = {path.name for path in (out / "notebooks").glob("[!.]*")}
    assert names == {f"{n}{s}" for n in ("01_first", "02_second") for s in (".ipynb", ".html")}


def test_a_kernel_that_dies_is_a_failure_of_its_cell(tmp_path):
    write_notebook(tmp_path, "01_first", "1 + 1", "import os; os._exit(9)", "2 + 2")
    with pytest.raises(NotebookError, match=r"(?s)failed in cell 3: import os.*DeadKernelError"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parameters": {"widht": 3}}, ["'widht'", "width", "rate", "parameters"]),
        ({"parameters": {"width": "wide"}}, ["width", "'wide'", "int", "01_first"]),
        ({"parameters": {"rate": True}}, ["rate", "True", "float", "02_second"]),
        ({"parameters": {"rate": 1.0}, "only": ["01"]}, ["'rate'", "width"]),
        ({"parameters": {"results": "x"}}, ["results", "pipeline"]),
        ({"only": ["03_third"]}, ["'03_third'", "01_first, 02_second"]),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, options, words):
    write_pair(tmp_path / "notebooks")
    with pytest.raises(InputError) as caught:
        run(tmp_path / "notebooks", tmp_path / "out", **options)
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_unknown_profile_and_missing_notebooks(tmp_path):
    write_pair(tmp_path / "notebooks")
    with pytest.raises(InputError, match=r"'huge'.*quick"):
        reproduce("huge", notebooks_dir=tmp_path / "notebooks", out=tmp_path / "out")
    with pytest.raises(InputError, match="no notebooks"):
        run(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "notebooks" / "01_first.ipynb").write_text("{")
    with pytest.raises(InputError, match="not a notebook"):
        run(tmp_path / "notebooks", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_folder_that_cannot_be_used(tmp_path):
    write_pair(tmp_path / "notebooks")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"not a manifest.*another"):
        run(tmp_path / "notebooks", tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"profile": "small", "notebooks": {}}')
    with pytest.raises(InputError, match="profile 'small'"):
        run(tmp_path / "notebooks", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"profile": ')
    with pytest.raises(InputError, match="not a manifest"):
        run(tmp_path / "notebooks", tmp_path / "out")


def test_parameters_are_read_as_declared(tmp_path):
    cell = (
        PARAMETERS
        + 'name: str = "a = b"\ncount: int = 3\nvalues: list[int] = [\n    1,\n]  # = some'
    )
    write_notebook(tmp_path, "01_first", parameters=cell)
    (notebook,) = find_notebooks(tmp_path)
    declared = {"profile": "str", "results": "str", "name": "str", "count": "int"}
    assert notebook.parameters == declared | {"values": "list[int]"}
    assert Notebook.read(tmp_path / "01_first.ipynb") == notebook


@given(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.lists(st.integers())
    | st.floats(allow_nan=False, allow_infinity=False)
)
def test_text_of_a_command_line_converts_to_the_declared_type(value):
    kind = "None" if value is None else type(value).__name__
    assert convert(value, kind) == value
    assert convert(str(value), kind) == value


def test_types_that_do_not_fit_are_refused():
    for value, kind in [("1.5", "int"), (True, "int"), ("x", "float"), ("1", "bool"), (3, "str")]:
        with pytest.raises(ValueError, match="is not"):
            convert(value, kind)
    assert convert("none", "int | None") is None
    assert convert("none", "str") == "none"
    assert convert("'quoted'", "str") == "'quoted'"
    assert convert("[1, 2]", "list[int]") == [1, 2]


WAITS = LOG + "import time\nwhile not (Path(results) / 'go').exists():\n    time.sleep(0.05)"


class Listener:
    """Keeps the lines, and lets notebook 02 end when it has heard that its last cell runs."""

    def __init__(self, out: Path):
        self.out, self.lines = out, []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if re.search("02_second, cell 3/3", line):
            (self.out / "go").touch()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_says_where_it_is_and_what_each_notebook_took(tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(pipeline, "PERIOD", 0.1)
    folder, out = tmp_path / "notebooks", tmp_path / "smoke"
    write_notebook(folder, "01_first", "1 + 1")
    write_notebook(folder, "02_second", "1 + 1", WAITS)

    def said(**options) -> str:
        heard = Listener(out)
        reproduce("smoke", notebooks_dir=folder, out=out, jobs=jobs, echo=heard, **options)
        return "\n".join(heard.lines)

    text = said()
    assert re.search(r"01_first, (cell \d/2, )?\d+ s", text) and "expected" not in text
    assert re.search(r"02_second, cell 3/3, \d+ s", text)
    for name in ("01_first", "02_second"):
        assert re.search(rf"^[12]/2 {name} +\d+\.\d s +\d+ MiB$", text, re.M)
    assert text.endswith(f"{out / 'notebooks'}\nrecord of the run: {out / 'manifest.json'}")
    (out / "go").unlink()
    assert re.search(r"01_first, .*\d+ s of \d+ s expected", said(fresh=True))


def test_what_is_expected_is_of_an_earlier_run_else_of_the_stored_table(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "checkout_root", lambda: tmp_path)
    for name in ("01_data", "02_model", "03_train", "04_more"):
        write_notebook(tmp_path / "notebooks", name)
    out = tmp_path / "results" / "quick"
    done = {"status": "done", "seconds": 3.5}
    update_manifest(
        out, "quick", {"01_data": done, "02_model": {"status": "failed", "seconds": 1.0}}
    )

    def expected() -> list[float | None]:
        return [task.expected for task in pipeline.make_tasks("quick", None, None, (), {}, False)]

    assert expected() == [3.5, None, None, None]
    table = "notebook,profile,seconds\n01_data,quick,5\n02_model,quick,7\n03_train,smoke,9\n"
    (tmp_path / "results" / "notebooks.csv").write_text(table)
    assert expected() == [3.5, 7, None, None]
