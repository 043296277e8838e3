"""Rows as a search and as the judging of policies store them."""

from crt_lib.study.ablations import BUDGET, RATES


def rows_of(arm, losses, rate=None, seen=None):
    """Of an arm, a seed a loss; `seen`: what its last exit loses where it sees the future."""
    return [
        {"arm": arm, "budget": BUDGET, "max_lr": rate or RATES[arm.split(",")[0]], "seed": seed}
        | {"settings": f"{arm} {seed}", "parameters": 7, "updates": 150, "cpu_seconds": 1.0}
        | {"valid_loss": loss, "exit_losses": f"1:9.0000 3:{seen or loss:.4f}"}
        for seed, loss in enumerate(losses)
    ]


def walked(arm, losses, rate=None):
    """Of an arm whose rate was walked: a worse one was tried on either side, with seed 0."""
    rate = rate or RATES[arm.split(",")[0]]
    worse = [losses[0] + 1]
    return rows_of(arm, losses, rate) + [
        row for beside in (rate / 2, rate * 2) for row in rows_of(arm, worse, beside)
    ]


def judged(name, policy, taken=1.0, above=0.1):
    """A row of `judge_policies`, as far as a policy and what decoding loses are read from it."""
    row = {"policy": name, "criterion": policy.criterion, "last": policy.fixed}
    asks = policy.criterion is not None
    row |= {n: getattr(policy, n) if asks else None for n in ("tau0", "tau_min", "decay")}
    interval = {"taken_low": above - 0.01, "taken_high": above + 0.01}
    return row | {"taken": taken, "taken_above": above} | interval
