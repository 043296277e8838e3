"""`crt gpu`, part checks: on this device the fast paths give what the slow, obvious ones give."""

import runpy
from collections.abc import Iterable

import torch
from torch import Tensor

from crt_lib.bench.table import put_rows, rows_of
from crt_lib.gpu.parts import Job, Row, say
from crt_lib.runs.manifest import checkout_root

CHECKS = "tests/gpu/checks.py"  # of the checkout


def run_checks(job: Job) -> None:
    """Every check that has not passed yet, a row each in checks.csv; raises if one fails.

    A check, of the file CHECKS, is a function of a device to pairs of tensors. They are apart by
    the norm of their difference over that of the second, at most by the check's bound.
    """
    checks, table = runpy.run_path(str(checkout_root() / CHECKS))["CHECKS"], job.out / "checks.csv"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (check, bound, how) in checks.items():
        if rows_of(table, check=name, passed="yes"):
            continue
        row: Row = {"check": name, "compared": check.__doc__, "apart": None, "bound": bound}
        row |= {"error": None, "passed": "no", "device": device.type}
        try:
            row["apart"] = worst_apart(check(device, **how))
            row["passed"] = "yes" if row["apart"] <= bound else "no"
        except Exception as error:  # a check may fail in any way
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        put_rows(table, [row], ["check"])
        said = f"{row['apart']}, at most {bound}; {row['error'] or 'no error'}"
        say(f"  {name}: passed {row['passed']} ({said})")
    failed = [row["check"] for row in rows_of(table, passed="no")]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def worst_apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest of what the pairs are apart; infinite where one is not a number."""
    worst = 0.0
    for ours, theirs in pairs:
        difference = (ours.double() - theirs.double()).norm()
        apart = float(difference / theirs.double().norm().clamp(min=1e-300))
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst
