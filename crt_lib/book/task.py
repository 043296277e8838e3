"""A notebook that runs: by papermill, in a kernel of its own, watched and recorded."""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from crt_lib.book.notebooks import Notebook, as_html
from crt_lib.files import RunError, locked, write_text
from crt_lib.runs.manifest import (
    library_sha256,
    now,
    read_manifest,
    run_environment,
    update_manifest,
)

STARTS = 3  # of a kernel, which dies where another program takes a port that was free
NOT_RECORDED = ("results", "fresh")  # where a run lies and how it was asked for change no result


class NotebookError(RunError):
    """Notebooks failed. The message names each, the cell, the error and how to continue."""


@dataclass(eq=False)
class Task:
    """A notebook to be run into a results folder; while it runs, where it is and what it takes."""

    notebook: Notebook
    values: dict[str, Any]  # its parameters
    out: Path
    profile: str
    fresh: bool  # also where it is done
    expected: float | None  # seconds, where an earlier run tells
    needs: tuple["Task", ...]  # those that must be done before
    label: str  # how it is called in a run of several
    begun: float = 0.0  # monotonic seconds
    cell: int = 0  # that runs, counted from 1 as in the source
    source: str = ""  # of that cell
    kernel: Any = None  # its process, by psutil
    peak: int = 0  # bytes of its kernel and of what that has started

    def watch(self) -> str:
        """Note its memory; its label, the cell it is at, and its seconds, of those expected."""
        self.processes()
        cell = f"cell {self.cell}/{self.notebook.n_cells}, " if self.cell else ""
        limit = "" if self.expected is None else f" of {self.expected:.0f} s expected"
        return f"{self.label}, {cell}{time.monotonic() - self.begun:.0f} s{limit}"

    def processes(self) -> list[Any]:
        """Its kernel and what that has started, by psutil; notes the most that they have held."""
        import psutil

        found: list[Any] = []
        with contextlib.suppress(psutil.Error, AttributeError):  # ended, or not yet begun
            found = [self.kernel, *self.kernel.children(recursive=True)]
            self.peak = max(self.peak, sum(process.memory_info().rss for process in found))
        return found

    def run(self, stopped: Event, environment: Mapping[str, str]) -> str:
        """Run the notebook, unless that is done; what it took. `environment`: of its kernel, too.

        Its outputs appear when it has ended well. Raises InputError while another process runs it,
        NotebookError when it fails; once `stopped` is set, that is no failure of its own.
        """
        import nbformat

        name = self.notebook.name
        final = self.out / "notebooks" / f"{name}.ipynb"
        kinds = (".running.ipynb", ".failed.ipynb", ".html")
        running, failed, page = map(final.with_suffix, kinds)
        entry: dict[str, Any] = {
            "source_sha256": self.notebook.source_sha256,
            "library_sha256": library_sha256(),
            "parameters": {k: v for k, v in self.values.items() if k not in NOT_RECORDED},
        }
        with locked(final.with_suffix(""), wait=False):
            before = read_manifest(self.out, self.profile)["notebooks"].get(name, {})
            stands = before.get("status") == "done" and before | entry == before
            if stands and not self.fresh and final.is_file() and page.is_file():
                return f"{_took(before)}  already done, skipped"
            entry |= {"environment": run_environment(), "started": now()}
            self._note(entry, status="running")
            running.unlink(missing_ok=True)  # of a run that was killed
            try:
                self._begin(running, environment, stopped)
            except Exception as error:
                said = self._failure(error)
                if not stopped.is_set():
                    with contextlib.suppress(FileNotFoundError):
                        running.replace(failed)
                    self._note(entry, status="failed", error=said)
                    said += f"\n  outputs so far: {failed}\n  the same command goes on"
                raise NotebookError(said) from error
            running.replace(final)
            failed.unlink(missing_ok=True)
            write_text(page, as_html(nbformat.read(final, 4), name))
            self._note(entry, status="done")
        return _took(entry)

    def _note(self, entry: dict[str, Any], **changes: Any) -> None:
        """Its entry of the manifest, changed; with what it took, once it has ended."""
        if changes["status"] != "running":
            seconds = round(time.monotonic() - self.begun, 2)
            changes |= {"finished": now(), "seconds": seconds, "peak_memory_bytes": self.peak}
        entry |= changes
        update_manifest(self.out, self.profile, {self.notebook.name: entry})

    def _failure(self, error: Exception) -> str:
        """The notebook, the cell that ran last and the error."""
        first, *_ = self.source.strip().splitlines() or ["(empty)"]
        where = f"in cell {self.cell}: {first}" if self.cell else "before its first cell"
        kind = getattr(error, "ename", type(error).__name__)
        text = str(getattr(error, "evalue", error)).strip()
        return f"notebook {self.notebook.name} failed {where}\n  {kind}: {text}"

    def _at_cell(self, cell: Any, cell_index: int) -> None:
        """Called by nbclient before each cell, also those that papermill has added."""
        if "injected-parameters" not in cell.metadata.get("tags", []):
            self.cell, self.source = self.cell + 1, cell.source

    def _begin(self, running: Path, environment: Mapping[str, str], stopped: Event) -> None:
        """Execute it; again where its kernel did not even come to a cell."""
        for left in reversed(range(STARTS)):
            try:
                return self._execute(running, environment)
            except RuntimeError:
                if self.cell or stopped.is_set() or not left:
                    raise

    def _execute(self, running: Path, environment: Mapping[str, str]) -> None:
        """By papermill into `running`, with a kernel of this very interpreter."""
        import papermill
        import psutil
        from ipykernel.kernelspec import RESOURCES, get_kernel_dict
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager

        spec = KernelSpec(resource_dir=RESOURCES, env=dict(environment), **get_kernel_dict())

        class ThisInterpreter(AsyncKernelManager):
            """Whatever kernels are installed for the user, the notebooks see these packages."""

            kernel_spec = spec

            async def start_kernel(manager, **how: Any) -> None:  # type: ignore[override]
                await super().start_kernel(**how)
                provisioner: Any = manager.provisioner
                self.kernel = psutil.Process(provisioner.pid)

        # Its only warnings here are about annotations that it does not know, such as `int | None`.
        logging.getLogger("papermill").setLevel(logging.ERROR)
        paths = (str(path) for path in (self.notebook.path, running))
        papermill.execute_notebook(
            *(path.replace("{", "{{").replace("}", "}}") for path in paths),
            parameters=self.values,
            kernel_name="python3",
            language="python",
            kernel_manager_class=ThisInterpreter,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(self.notebook.path.parent)}},
            on_cell_start=self._at_cell,
            progress_bar=False,
        )


def _took(entry: Mapping[str, Any]) -> str:
    return f"{entry['seconds']:8.1f} s  {entry['peak_memory_bytes'] / 2**20:7,.0f} MiB"
