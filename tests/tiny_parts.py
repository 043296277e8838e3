"""Parts of a measurement that do what a part may do; their processes import this file."""

import os
import time

from waiting import PATIENCE

from crt_lib.bench.table import put_rows
from crt_lib.files import InputError
from crt_lib.gpu.parts import Job


def works(job: Job) -> None:
    put_rows(job.out / "works.csv", [{"call": time.time()}], ["call"])


def raises(job: Job) -> None:
    raise ValueError("no such day\nand more")


def crashes(job: Job) -> None:
    os._exit(3)


def hangs(job: Job) -> None:
    (job.out / "hanging").touch()
    time.sleep(10 * PATIENCE)


def late(job: Job) -> None:
    if not (job.out / "again").exists():
        (job.out / "again").touch()
        raise InputError("half is done")
