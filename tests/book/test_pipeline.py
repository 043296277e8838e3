"""The pipeline, on tiny notebooks that really run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_notebooks
from hypothesis import given, strategies as st
from waiting import wait_for

from crt_lib.book.notebooks import Notebook, convert, find_notebooks
from crt_lib.book.pipeline import NotebookError, reproduce, results_table
from crt_lib.files import InputError
from crt_lib.runs.manifest import Manifest, read_training, record_training, run_environment

PARAMETERS = 'profile: str = "small"  # scale\nresults: str = "nowhere"  # where = which folder\n'
LOG = "from pathlib import Path\nlog = open(Path(results) / 'log.txt', 'a')\n"


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    tiny_notebooks.write_notebook(folder, name, *cells, parameters=parameters)


def write_pair(folder: Path) -> None:
    """01 counts its runs in log.txt; 02 too, unless a file `fault` lies in the results."""
    write_notebook(
        folder,
        "01_first",
        LOG + "print(f'first {profile} {width} {names}', file=log, flush=True)",
        parameters=PARAMETERS + "width: int | None = 3  # a size\nnames: list[str] = []",
    )
    write_notebook(
        folder,
        "02_second",
        LOG + "if (Path(results) / 'fault').exists():\n    raise ValueError('a fault: 42')",
        "print('second', rate, file=log, flush=True)",
        parameters=PARAMETERS + "rate: float = 0.5",
    )


def log(out: Path) -> list[str]:
    return (out / "log.txt").read_text().splitlines()


def run(folder: Path, out: Path, **options) -> list[str]:
    """What `reproduce` says, without the lines that tell where it is."""
    lines: list[str] = []
    reproduce("smoke", notebooks_dir=folder, out=out, echo=lines.append, **options)
    return [line for line in lines if "MiB" in line or not re.search(r", \d+ s", line)]


def test_runs_in_order_and_continues_after_a_failure(tmp_path, monkeypatch):
    folder, out = tmp_path / "notebooks", tmp_path / "a {odd} folder" / "smoke"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crt_lib.book.pipeline.library_sha256", lambda: "before")
    write_pair(folder)
    given = {"width": "7", "rate": 2, "names": "['a']"}
    out.mkdir(parents=True)
    (out / "fault").touch()
    record_training(out, "smoke", {"status": "done"})
    (out / "paper").mkdir()
    (out / "paper" / "results.csv").write_text(
        "exit,tokens,token_ppl\n2,1200,31.25681\nfinal,1200,30.0\n"
    )

    with pytest.raises(NotebookError) as caught:
        run(folder, out, parameters=given)
    message = str(caught.value)
    assert "notebook 02_second failed in cell 2: from pathlib import Path" in message
    assert "ValueError: a fault: 42" in message
    assert "crt reproduce --profile smoke -p width=7 -p rate=2 -p 'names=['" in message
    assert (out / "notebooks" / "02_second.failed.ipynb").is_file()
    assert not (out / "notebooks" / "02_second.ipynb").exists()
    assert Manifest.load(out / "manifest.json", "smoke").notebooks["02_second"]["error"]
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
    assert record["environment"]["versions"]["torch"] and record["seed"] is not None
    first = record["notebooks"]["01_first"]
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

    run(folder, out, only=["first"], parameters={"width": None})
    run(folder, out, only=["01"], parameters={"width": None}, fresh=True)
    monkeypatch.setattr("crt_lib.book.pipeline.library_sha256", lambda: "after")
    run(folder, out, only=["01_first.ipynb"], parameters={"width": None})
    assert log(out)[3:] == ["first smoke None []"] * 3


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
    assert (
        Manifest.load(out / "manifest.json", "smoke").notebooks["02_second"]["status"] == "running"
    )
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
        ({"parameters": {"width": "wide"}}, ["width", "'wide'", "int | None", "01_first"]),
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
    with pytest.raises(InputError, match=r"cannot (read|write).*another"):
        run(tmp_path / "notebooks", tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"profile": "small", "notebooks": {}}')
    with pytest.raises(InputError, match="profile 'small'"):
        run(tmp_path / "notebooks", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"profile": ')
    with pytest.raises(InputError, match="not a manifest"):
        run(tmp_path / "notebooks", tmp_path / "out")


def test_parameters_are_read_as_declared(tmp_path):
    cell = PARAMETERS + 'name = "a = b"\ncount = 3\nvalues: list[int] = [\n    1,\n]  # = some\n'
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
    for value, kind in [("1.5", "int"), (True, "int"), ("x", "float"), ("2", "Literal[1, 3]")]:
        with pytest.raises(ValueError, match="is not"):
            convert(value, kind)
    assert convert("3", "Literal[1, 3]") == 3
    assert convert("none", "int | None") is None
    assert convert("none", "str") == "none"
    assert convert("'quoted'", "str") == "'quoted'"
    assert convert("[1, 2]", "list[int]") == [1, 2]


def test_a_training_and_the_pipeline_keep_each_others_records(tmp_path):
    assert read_training(tmp_path) is None
    manifest = Manifest.load(tmp_path / "manifest.json", "smoke")
    manifest.save()
    record_training(tmp_path, "smoke", {"status": "running"})
    manifest.record("03_train", {"status": "done"})
    manifest.save()
    assert read_training(tmp_path) == {"status": "running"}
    record_training(tmp_path, "smoke", {"status": "done"})
    assert Manifest.load(tmp_path / "manifest.json", "smoke").notebooks == manifest.notebooks
    with pytest.raises(InputError, match="profile 'smoke', not 'quick'"):
        record_training(tmp_path, "quick", {})


def test_environment_is_plain_json():
    found = run_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu_count"] >= 1 and found["device"] and found["versions"]["python"]


def test_results_table_without_a_file(tmp_path):
    assert results_table(tmp_path / "results.csv") == ""
