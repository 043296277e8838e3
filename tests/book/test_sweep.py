"""Notebooks over a grid of parameters, and a cluster whose worker is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_notebooks
from waiting import PATIENCE, wait_for

from crt_lib import InputError
from crt_lib.book.sweep import sweep
from crt_lib.book.task import NotebookError
from crt_lib.files import read_rows, write_rows
from crt_lib.runs.manifest import read_manifest

PARAMETERS = 'results: str = "nowhere"\nseed: int = 0\nsize: float = 1.0\nname: str = ""\n'
HEAD = "import os, time\nfrom pathlib import Path\nout = Path(results)\n"
SCORE = "(out / 'run').mkdir(exist_ok=True)\n(out / 'run' / 'results.csv').write_text('loss\\n' + "


def write_notebook(folder: Path, name: str, source: str) -> None:
    tiny_notebooks.write_notebook(folder, name, HEAD + source, parameters=PARAMETERS)


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

    def run_all(tasks, jobs, echo):
        for i, task in enumerate(tasks):
            assert task.out == out / task.label.removesuffix("/01_a")
            write_rows(task.out / "run" / "results.csv", [{"loss": i}])

    monkeypatch.setattr("crt_lib.book.sweep.run_all", run_all)
    grid = {"seed": ["0", "1", "0"], "size": ["0.25", "0.5"]}
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
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: len(list(out.glob("*/*.pid"))) == 3)  # begun again
        (out / "go").touch()
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "2 rows" in said
    assert [row["loss"] for row in read_rows(out / "sweep.csv")] == [0, 1]
    for seed in range(2):
        assert read_manifest(out / f"seed={seed}")["notebooks"]["01_a"]["status"] == "done"


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
