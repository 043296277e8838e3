"""`crt reproduce`: run the numbered notebooks, keep their outputs, continue where it stopped."""

import contextlib
import csv
import logging
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_lib.book.notebooks import Notebook, check_parameters, find_notebooks
from crt_lib.book.progress import (
    LiveLine,
    elapsed,
    every,
    expected_seconds,
    joined,
    say,
    source_cells,
    where,
)
from crt_lib.files import InputError, RunError, atomic_path, locked, write_text
from crt_lib.runs.manifest import Manifest, checkout_root, library_sha256, now, run_environment
from crt_lib.runs.profiles import load_profile

SET_BY_PIPELINE = ("profile", "results", "fresh")
NOT_RECORDED = ("results", "fresh")  # where a run lies and how it was asked for change no result


class NotebookError(RunError):
    """A notebook failed. The message names it, the cell, the error and how to continue."""


def reproduce(
    profile: str = "quick",
    *,
    notebooks_dir: Path | None = None,
    out: Path | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    fresh: bool = False,
    echo: Callable[[str], None] = say,
) -> Manifest:
    """Run the notebooks of `notebooks_dir` in order into `out`, `results/<profile>` by default.

    A notebook whose entry in the manifest is done, with the same source, library and parameters,
    and whose outputs exist, is skipped; `fresh` runs all again. `parameters` (values of their
    type, or text) go to the notebooks that declare them in their cell tagged `parameters`, as do
    `profile`, `results` (the absolute path of `out`) and `fresh`.

    Says where it is, how long each has taken and, from an earlier run or `results/notebooks.csv`,
    how long that is expected to be: on a terminal in a line that changes, else every 15 seconds.

    Writes `out/notebooks/NN_name.ipynb` and `.html`, and `out/manifest.json` after each. Raises
    InputError, with nothing run or written, for an unknown profile, notebook or parameter, a value
    that does not fit its declared type, a missing package, and a folder that cannot be written;
    NotebookError if a notebook fails.
    """
    given = dict(parameters or {})
    plan = check_run(profile, notebooks_dir, out, only, given, fresh)
    out, manifest, notebooks = plan.out, plan.manifest, plan.notebooks
    command = shlex.join(["crt", *reproduce_words(profile, only, given, out, plan.folder, False)])
    run = _Run(manifest, library_sha256(), out / "notebooks", command, plan.expected, echo)
    for position, notebook in enumerate(notebooks, start=1):
        label = f"{position}/{len(notebooks)} {notebook.name}"
        entry = run.entry(notebook, plan.values[notebook.name])
        with locked(run.folder / notebook.name):
            manifest.refresh()
            if not fresh and run.is_done(notebook, entry):
                echo(f"{label:<32} already done, skipped")
            else:
                run.execute(notebook, plan.values[notebook.name], entry, label)
    summarise_run(plan, echo)
    return manifest


@dataclass(frozen=True)
class Plan:
    """What is to be run, all of it checked, and the manifest begun."""

    notebooks: list[Notebook]
    values: dict[str, dict[str, Any]]  # parameters by notebook
    folder: Path  # of the notebooks
    out: Path
    manifest: Manifest
    expected: dict[str, float]  # seconds by notebook, of those known


def check_run(
    profile: str,
    notebooks_dir: Path | None,
    out: Path | None,
    only: Sequence[str],
    given: Mapping[str, Any],
    fresh: bool,
) -> Plan:
    """The plan of `reproduce` with these arguments; raises InputError as it does."""
    seed = load_profile(profile).train.seed
    refuse_own(given)
    root = checkout_root()
    folder = Path(notebooks_dir or root / "notebooks").absolute()
    notebooks = find_notebooks(folder, only)
    out = Path(out or root / "results" / profile).absolute()
    own = {"profile": profile, "results": str(out), "fresh": fresh}
    values = _values(notebooks, dict(given), own)
    _require_packages()

    manifest = Manifest.load(out / "manifest.json", profile)
    manifest.seed = next((v["seed"] for v in values.values() if "seed" in v), seed)
    manifest.parameters = {k: v[k] for k in given for v in values.values() if k in v}
    manifest.environment = run_environment()
    manifest.save()
    names, stored = [notebook.name for notebook in notebooks], root / "results" / "notebooks.csv"
    expected = expected_seconds(names, manifest.notebooks, stored, profile)
    return Plan(notebooks, values, folder, out, manifest, expected)


@dataclass(frozen=True)
class _Run:
    manifest: Manifest
    library: str
    folder: Path
    continue_with: str
    expected: dict[str, float]
    echo: Callable[[str], None]

    def entry(self, notebook: Notebook, values: Mapping[str, Any]) -> dict[str, Any]:
        """What decides whether an earlier run of the notebook still stands."""
        return {
            "source_sha256": notebook.source_sha256,
            "library_sha256": self.library,
            "parameters": {k: v for k, v in values.items() if k not in NOT_RECORDED},
        }

    def is_done(self, notebook: Notebook, entry: Mapping[str, Any]) -> bool:
        before = self.manifest.notebooks.get(notebook.name, {})
        same = all(before.get(key) == value for key, value in entry.items())
        outputs = [self.folder / f"{notebook.name}{suffix}" for suffix in (".ipynb", ".html")]
        return before.get("status") == "done" and same and all(p.is_file() for p in outputs)

    def execute(
        self, notebook: Notebook, values: dict[str, Any], entry: dict[str, Any], label: str
    ) -> None:
        """Run one notebook under a temporary name; its outputs appear when it has ended well."""
        running = self.folder / f"{notebook.name}.running.ipynb"
        failed = self.folder / f"{notebook.name}.failed.ipynb"
        entry |= {"environment": run_environment(), "started": now()}
        self.manifest.record(notebook.name, entry | {"status": "running"})
        begin = time.monotonic()
        error = None
        try:
            with ended_by_sigterm(), self._watched(notebook.name, running, label) as peak:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    _papermill(notebook.path, running, values)
                except (RuntimeError, OSError, _execution_error()) as caught:
                    error = caught
        except (KeyboardInterrupt, SystemExit):
            self.echo(f"{label} interrupted; continue with: {self.continue_with}")
            raise
        seconds = round(time.monotonic() - begin, 2)
        entry |= {"finished": now(), "seconds": seconds, "peak_memory_bytes": peak[0]}
        if error is not None:
            message = _failure(notebook.name, running, error)
            with contextlib.suppress(FileNotFoundError):
                running.replace(failed)
                message += f"\n  outputs so far: {_shown(failed)}"
            self.manifest.record(notebook.name, entry | {"status": "failed", "error": message})
            raise NotebookError(f"{message}\n  continue with: {self.continue_with}") from error
        write_text(self.folder / f"{notebook.name}.html", _html(running))
        with atomic_path(self.folder / f"{notebook.name}.ipynb") as temporary:
            shutil.copyfile(running, temporary)
        running.unlink()
        failed.unlink(missing_ok=True)
        self.manifest.record(notebook.name, entry | {"status": "done"})
        self.echo(f"{label:<32} {seconds:8.1f} s  {peak[0] / 2**20:7,.0f} MiB")

    @contextlib.contextmanager
    def _watched(self, name: str, running: Path, label: str) -> Iterator[list[int]]:
        """Say where the notebook is while the block runs; yields `[bytes]`, its peak memory."""
        begun, line = time.monotonic(), LiveLine(self.echo)
        running.unlink(missing_ok=True)  # of a run that was killed

        def show() -> None:
            cell, section = where(running)
            line.show(joined(label, cell, elapsed(begun, self.expected.get(name)), section))

        try:
            with _peak_of_children() as peak, every(line.period, show):
                yield peak
        finally:
            line.clear()


def _values(
    notebooks: Sequence[Notebook], given: dict[str, Any], own: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Parameters by notebook: the user's (checked), then the pipeline's where declared."""
    declared = {name for notebook in notebooks for name in notebook.parameters}
    return check_parameters(notebooks, given | {k: v for k, v in own.items() if k in declared})


def _require_packages() -> None:
    try:
        import ipykernel  # noqa: F401
        import nbconvert  # noqa: F401
        import papermill  # noqa: F401
        import psutil  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"running the notebooks needs the package {error.name!r}. "
            "Install the extra: pip install -e '.[notebooks]'"
        ) from error


def _execution_error() -> type[Exception]:
    from papermill.exceptions import PapermillExecutionError

    return PapermillExecutionError


def _papermill(source: Path, target: Path, values: dict[str, Any]) -> None:
    """Execute `source` into `target` with a kernel of this very interpreter."""
    import papermill
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        """Whatever kernels are installed for the user, the notebooks see these packages."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    # Its only warnings here are about annotations that it does not know, such as `int | None`.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill.execute_notebook(
        *(str(path).replace("{", "{{").replace("}", "}}") for path in (source, target)),
        parameters=values,
        kernel_name="python3",
        language="python",
        kernel_manager_class=ThisInterpreter,
        extra_arguments=["--log-level=ERROR"],
        cwd=source.parent,
        progress_bar=False,
    )


def _html(notebook: Path) -> str:
    from nbconvert import HTMLExporter

    name = notebook.name.removesuffix(".running.ipynb")
    resources = {"metadata": {"name": name}}
    body, _ = HTMLExporter().from_filename(str(notebook), resources=resources)
    return body


@contextlib.contextmanager
def _peak_of_children(interval: float = 0.2) -> Iterator[list[int]]:
    """Yield `[bytes]`: the highest resident memory of this process's descendants, sampled."""
    import psutil

    peak = [0]
    this = psutil.Process()

    def sample() -> None:
        total = 0
        for process in this.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        peak[0] = max(peak[0], total)

    with every(interval, sample):
        yield peak


def _failure(name: str, running: Path, error: Exception) -> str:
    """The notebook, the cell that ran last (counted from 1, as in the source) and the error."""
    cells = source_cells(running)
    started = [
        index
        for index, cell in enumerate(cells)
        if cell["metadata"].get("papermill", {}).get("start_time")
    ]
    kind = getattr(error, "ename", type(error).__name__)
    text = str(getattr(error, "evalue", error)).strip()
    where = "before its first cell"
    if started:
        source = "".join(cells[started[-1]]["source"]).strip()
        where = f"in cell {started[-1] + 1}: {(source.splitlines() or ['(empty)'])[0]}"
    return f"notebook {name} failed {where}\n  {kind}: {text}"


def refuse_own(given: Iterable[str]) -> None:
    """Raise InputError for a parameter that the pipeline itself sets."""
    for name in set(given).intersection(SET_BY_PIPELINE):
        raise InputError(f"parameter {name!r} is set by the pipeline; use its own option")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit inside, as SIGINT raises KeyboardInterrupt where it is heard.

    A command that a shell runs in the background ignores SIGINT, and so does all that it starts.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may ask for signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reproduce_words(
    profile: str,
    only: Sequence[str],
    given: Mapping[str, Any],
    out: Path,
    folder: Path,
    fresh: bool,
) -> tuple[str, ...]:
    """The words after `crt` that mean the same as a call of `reproduce`."""
    root = checkout_root()
    words = ["reproduce", "--profile", profile]
    for name in only:
        words += ["--only", name]
    for name, value in given.items():
        words += ["-p", f"{name}={value}"]
    if out != root / "results" / profile:
        words += ["--out", _shown(out)]
    if folder != root / "notebooks":
        words += ["--notebooks", _shown(folder)]
    return (*words, "--fresh") if fresh else tuple(words)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def results_table(path: Path) -> str:
    """The rows of a results.csv as aligned text, numbers to four digits; "" without the file."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        return ""
    cells = [[_number(cell) for cell in row] for row in rows if row]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def _number(cell: str) -> str:
    try:
        value = float(cell)
    except ValueError:
        return cell
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"


def summarise_run(plan: Plan, echo: Callable[[str], None]) -> None:
    """Say what a run's folder holds: its results, a line a notebook, and where to look."""
    out = plan.out
    for path in sorted(out.glob("*/results.csv")):
        echo(f"\n{path.parent.name}\n{results_table(path)}")
    plan.manifest.refresh()
    echo(f"\n{'notebook':<24} {'seconds':>8} {'peak MiB':>9}")
    for notebook in plan.notebooks:
        entry = plan.manifest.notebooks[notebook.name]
        peak = entry["peak_memory_bytes"] / 2**20
        echo(f"{notebook.name:<24} {entry['seconds']:8.1f} {peak:9,.0f}")
    echo(f"\nexecuted notebooks and HTML: {_shown(out / 'notebooks')}")
    if (out / "figures").is_dir():
        echo(f"figures: {_shown(out / 'figures')}")
    echo(f"record of the run: {_shown(out / 'manifest.json')}")
