"""How long `make test` takes on this machine, for `crt doctor`: results/tests.csv."""

import subprocess
import time
from pathlib import Path

from crt_lib.files import write_rows
from crt_lib.runs.machine import measured_on
from crt_lib.study.doctor import TESTS, update_seconds

if __name__ == "__main__":
    update, begun = update_seconds("fp32"), time.monotonic()
    subprocess.run(["make", "test"], check=True)
    taken = round(time.monotonic() - begun)
    row = {"seconds": taken, "update_seconds": round(update, 4), **measured_on()}
    write_rows(Path("results") / TESTS, [row])
