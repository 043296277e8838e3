"""Notebooks several at a time, grids of them, and a cluster whose worker is killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiny_notebooks
from waiting import PATIENCE, wait_for

from crt_lib import InputError
from crt_lib.book.batch import Job, reproduce_parallel, run_jobs, sweep
from crt_lib.book.pipeline import NotebookError
from crt_lib.files import read_rows, write_rows
from crt_lib.runs.manifest import Manifest

PARAMETERS = 'results: str = "nowhere"\nseed: int = 0\nsize: float = 1.0\nname: str = ""\n'
HEAD = "import os, time\nfrom pathlib import Path\nout = Path(results)\n"
SCORE = "(out / 'run').mkdir(exist_ok=True)\n(out / 'run' / 'results.csv').write_text('loss\\n' + "


def write_notebook(folder: Path, name: str, source: str, after=()) -> None:
    tiny_notebooks.write_notebook(folder, name, HEAD + source, parameters=PARAMETERS, after=after)


MEET = f"""
(out / f"{{here}}.begun").touch()
end = time.monotonic() + {PATIENCE}
while not (out / f"{{there}}.begun").exists():
    assert time.monotonic() < end, "the other never ran beside this one"
    time.sleep(0.05)
"""


def test_independent_notebooks_run_at_once_and_others_after_what_they_need(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "01_a", "here, there = 'a', 'b'" + MEET + "(out / 'a').touch()")
    write_notebook(folder, "02_b", "here, there = 'b', 'a'" + MEET)
    write_notebook(folder, "03_c", "assert (out / 'a').exists()", after=["01_a"])
    lines: list[str] = []
    given = {"seed": "3"}
    made = reproduce_parallel(
        "smoke", 2, notebooks_dir=folder, out=out, parameters=given, echo=lines.append
    )
    ended = [line.split()[1] for line in lines if re.match(r"[123]/3 0", line)]
    assert set(ended) == {"01_a", "02_b", "03_c"} and len(ended) == 3
    again = Manifest.load(out / "manifest.json", "smoke")
    assert {entry["status"] for entry in again.notebooks.values()} == {"done"}
    assert set(again.notebooks) == {"01_a", "02_b", "03_c"} == set(made.notebooks)
    record = json.loads((out / "manifest.json").read_text())
    assert record["parameters"] == {"seed": 3} and record["seed"] == 3
    before = again.notebooks["01_a"]["finished"], again.notebooks["01_a"]["started"]
    reproduce_parallel("smoke", 2, notebooks_dir=folder, out=out, parameters=given, echo=print)
    after = Manifest.load(out / "manifest.json", "smoke").notebooks["01_a"]
    assert (after["finished"], after["started"]) == before  # not run again


def test_a_failure_is_told_and_what_needs_it_is_not_begun(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "01_a", "raise ValueError('a fault: 42')")
    write_notebook(folder, "02_b", "(out / 'b').touch()", after=["01_a"])
    with pytest.raises(NotebookError, match=r"(?s)01_a failed.*a fault: 42.*continue with"):
        reproduce_parallel("smoke", 2, notebooks_dir=folder, out=out, echo=print)
    assert not (out / "b").exists()
    with pytest.raises(InputError, match="wait for each other"):
        run_jobs([Job("a", ("--help",), ("b",)), Job("b", ("--help",), ("a",))], 2)


@pytest.mark.parametrize(
    ("number", "sigint"),
    [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_IGN)],
    ids=["interrupted", "ended in the background"],  # where a shell has SIGINT ignored
)
def test_an_interruption_reaches_the_running_notebooks(tmp_path, number, sigint):
    """They would sleep for longer than is waited."""
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    for name in ("01_a", "02_b"):
        write_notebook(folder, name, f"(out / '{name}').touch()\ntime.sleep({10 * PATIENCE})")
    command = [
        sys.executable,
        "-m",
        "crt_lib.cli",
        "reproduce",
        "--profile",
        "smoke",
        "--jobs",
        "2",
    ]
    command += ["--notebooks", str(folder), "--out", str(out)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )
    wait_for(lambda: (out / "01_a").exists() and (out / "02_b").exists())
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = process.communicate(timeout=PATIENCE)[0].decode()
    assert process.returncode == 128 + number
    assert len(started) >= 4  # a run and a kernel for each
    assert not psutil.wait_procs(started, timeout=PATIENCE)[1]
    assert "the same command goes on" in said
    found = Manifest.load(out / "manifest.json", "smoke").notebooks
    assert {entry["status"] for entry in found.values()} == {"running"}


def test_a_sweep_runs_every_point_once_and_gathers_the_rows(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    body = "(out / f'{time.monotonic()}.run').touch()\n" + SCORE + "str(seed + size))"
    write_notebook(folder, "01_a", body + "\nif (out / '../fault').exists() and seed: 1 / 0")
    grid = {"seed": ["0", "1"], "size": ["0.25"]}
    how = {"profile": "smoke", "notebooks_dir": folder, "echo": print}
    out.mkdir()
    (out / "fault").touch()
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        sweep(["a"], grid, out, **how)
    (out / "fault").unlink()
    rows = sweep(["a"], grid, out, jobs=2, **how)
    assert len(rows) == 2 and read_rows(out / "sweep.csv") == [
        {"grid_seed": s, "grid_size": 0.25, "run": "run", "loss": s + 0.25} for s in (0, 1)
    ]
    assert len(list((out / "seed=0,size=0.25").glob("*.run"))) == 1


def test_a_grid_has_every_combination(tmp_path, monkeypatch):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "01_a", "1")

    def run_jobs(work, jobs, echo):
        for i, job in enumerate(work):
            assert job.words[job.words.index("--out") + 1] == str(out / job.name)
            write_rows(out / job.name / "run" / "results.csv", [{"loss": i}])

    monkeypatch.setattr("crt_lib.book.batch.run_jobs", run_jobs)
    grid = {"seed": ["0", "1"], "size": ["0.25", "0.5"]}
    assert sweep(["a"], grid, out, profile="smoke", notebooks_dir=folder) == [
        {"grid_seed": str(s), "grid_size": str(x), "run": "run", "loss": 2 * s + 4 * x - 1}
        for s in (0, 1)
        for x in (0.25, 0.5)
    ]


def test_bad_grids_are_refused_before_anything_runs(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "01_a", "1")
    how = {"profile": "smoke", "notebooks_dir": folder}
    for grid, word in (
        ({}, "empty"),
        ({"sede": ["1"]}, "sede"),
        ({"seed": ["1", "x"]}, "'x'"),
        ({"seed": ["1"], "results": ["a"]}, "set by the pipeline"),
        ({"seed": ["1"], "name": ["a/b"]}, "cannot be called"),
    ):
        with pytest.raises(InputError, match=word):
            sweep(["01_a"], grid, out, **how)
    with pytest.raises(InputError, match="jobs is 0"):
        sweep(["01_a"], {"seed": ["1"]}, out, jobs=0, **how)
    assert not list(out.glob("*"))


def attempts(out: Path) -> list[psutil.Process]:
    """The processes below this one that run a notebook into a folder of `out`."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if any(f"{out}/" in word for word in words_of(p))]


def words_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
        return process.cmdline()
    return []


def test_a_killed_worker_of_a_cluster_loses_nothing(tmp_path):
    distributed = pytest.importorskip("distributed")
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    body = f"(out / f'{{os.getpid()}}.pid').touch()\n{SCORE}str(seed))\n"
    write_notebook(folder, "01_a", body + "while not (out / '../go').exists(): time.sleep(0.05)")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        workers = [nanny.pid for nanny in cluster.workers.values()]
        command = [sys.executable, "-m", "crt_lib.cli", "sweep", "01_a", "--profile", "smoke"]
        command += ["--grid", "seed=0,1", "--out", str(out), "--notebooks", str(folder)]
        command += ["--scheduler", cluster.scheduler_address]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(list(out.glob("*/*.pid"))) == 2)
        before = set(attempts(out))
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: set(attempts(out)) - before)  # begun again
        (out / "go").touch()
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "2 rows" in said
    assert [row["loss"] for row in read_rows(out / "sweep.csv")] == [0, 1]
    for seed in range(2):
        found = Manifest.load(out / f"seed={seed}" / "manifest.json", "smoke").notebooks
        assert found["01_a"]["status"] == "done"


def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    client = distributed.Client
    monkeypatch.setattr(
        distributed, "Client", lambda address, timeout: client(address, timeout=0.1)
    )
    write_notebook(tmp_path / "notebooks", "01_a", "1")
    how = {"profile": "smoke", "notebooks_dir": tmp_path / "notebooks"}
    with pytest.raises(InputError, match="no Dask scheduler"):
        sweep(["01_a"], {"seed": ["0"]}, tmp_path / "out", scheduler="tcp://127.0.0.1:1", **how)
