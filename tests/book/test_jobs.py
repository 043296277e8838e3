"""Notebooks that run at once: their order, their kernels, and how all of them end."""

import contextlib
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from jupyter_client.connect import LocalPortCache
from tiny_notebooks import LOG, PARAMETERS, log, run, write_notebook
from waiting import PATIENCE, wait_for

from crt_lib.book.task import STARTS, NotebookError
from crt_lib.files import InputError, locked
from crt_lib.runs.manifest import read_manifest

MEET = f"""
import time
from pathlib import Path
out = Path(results)
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
    needs_a = LOG + "assert (Path(results) / 'a').exists()"
    write_notebook(folder, "03_c", needs_a, parameters=PARAMETERS + "seed: int = 0", after=["01_a"])
    lines = run(folder, out, jobs=2, parameters={"seed": "3"})
    ended = [line.split()[1] for line in lines if re.match(r"[123]/3 0", line)]
    assert set(ended) == {"01_a", "02_b", "03_c"} and len(ended) == 3
    made = read_manifest(out)
    assert {entry["status"] for entry in made["notebooks"].values()} == {"done"}
    assert made["notebooks"]["03_c"]["parameters"]["seed"] == 3
    run(folder, out, jobs=2, parameters={"seed": "3"})
    assert read_manifest(out)["notebooks"] == made["notebooks"]  # not run again


def test_the_longest_chain_comes_first_and_one_alone_has_all_processors(tmp_path, monkeypatch):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    threads = LOG + "import os\nprint(os.environ['OMP_NUM_THREADS'], file=log)"
    write_notebook(folder, "01_a", "here, there = 'a', 'c'" + MEET, threads)
    write_notebook(folder, "02_b", LOG + "assert (Path(results) / 'c.begun').exists()")
    write_notebook(folder, "03_c", "here, there = 'c', 'a'" + MEET, threads)
    write_notebook(folder, "04_d", "", after=["03_c"])
    write_notebook(folder, "05_e", threads, after=["01_a", "02_b", "04_d"])
    run(folder, out, jobs=2)
    assert log(out) == ["3", "3", "6"]


def test_what_needs_a_failed_one_is_not_begun(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "01_a", "raise ValueError('a fault: 42')")
    write_notebook(folder, "02_b", LOG, after=["01_a"])
    with pytest.raises(NotebookError, match=r"(?s)01_a failed.*a fault: 42"):
        run(folder, out, jobs=2)
    assert not (out / "log.txt").exists()
    with pytest.raises(InputError, match="jobs is 0"):
        run(folder, tmp_path / "other", jobs=0)
    assert not (tmp_path / "other").exists()


def test_a_notebook_runs_once_at_a_time(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_first", LOG)
    refused = pytest.raises(NotebookError, match="another process is writing")
    with locked(tmp_path / "out" / "notebooks" / "01_first"), refused:
        run(tmp_path / "notebooks", tmp_path / "out")
    assert not (tmp_path / "out" / "log.txt").exists()


@pytest.mark.parametrize(("clashes", "status"), [(STARTS - 1, "done"), (STARTS, "failed")])
def test_a_kernel_whose_port_another_program_took(tmp_path, monkeypatch, capfd, clashes, status):
    """Another is begun, as long as that has some sense."""
    find, asked = LocalPortCache.find_available_port, []
    write_notebook(tmp_path / "notebooks", "01_first", LOG + "print('ran', file=log)")
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def finds(cache: LocalPortCache, ip: str) -> int:
            asked.append(ip)
            last = len(asked) > 5 * clashes  # a kernel asks for five
            return find(cache, ip) if last else taken.getsockname()[1]

        monkeypatch.setattr(LocalPortCache, "find_available_port", finds)
        failure = pytest.raises(NotebookError, match="failed before its first cell")
        with failure if status == "failed" else contextlib.nullcontext():
            run(tmp_path / "notebooks", tmp_path / "out")
    assert read_manifest(tmp_path / "out")["notebooks"]["01_first"]["status"] == status
    assert capfd.readouterr().err.count("Address already in use") == clashes
    assert (tmp_path / "out" / "log.txt").exists() is (status == "done")


@pytest.mark.parametrize(
    ("number", "sigint"),
    [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_IGN)],
    ids=["interrupted", "ended in the background"],  # where a shell has SIGINT ignored
)
def test_an_interruption_reaches_the_running_notebooks(tmp_path, number, sigint):
    """They would sleep for longer than is waited."""
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    sleeps = f"import time\ntime.sleep({10 * PATIENCE})"
    for name in ("01_a", "02_b"):
        write_notebook(folder, name, f"{LOG}(Path(results) / '{name}').touch()\n{sleeps}")
    words = ["reproduce", "--profile", "smoke", "--jobs", "2"]
    words += ["--notebooks", str(folder), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "crt_lib.cli", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )
    failed = (out / "notebooks").glob
    wait_for(
        lambda: (
            all((out / name).exists() for name in ("01_a", "02_b"))
            or list(failed("*.failed.ipynb"))
            or process.poll() is not None
        )
    )
    assert not list(failed("*.failed.ipynb")), read_manifest(out)["notebooks"]
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = process.communicate(timeout=PATIENCE)[0].decode()
    assert process.returncode == 130
    assert len(started) >= 2  # a kernel for each
    assert not psutil.wait_procs(started, timeout=PATIENCE)[1]
    assert "the same command goes on" in said
    found = read_manifest(out)["notebooks"]
    assert {entry["status"] for entry in found.values()} == {"running"}
