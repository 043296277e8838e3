"""Rows as a search stores them."""

from crt_lib.study.ablations import BUDGET, RATES


def rows_of(arm, losses, rate=None, seen=None):
    """Of an arm, a seed a loss; `seen`: what its last exit loses where it sees the future."""
    return [
        {"arm": arm, "budget": BUDGET, "max_lr": rate or RATES[arm.split(",")[0]], "seed": seed}
        | {"settings": f"{arm} {seed}", "parameters": 7, "updates": 150, "cpu_seconds": 1.0}
        | {"valid_loss": loss, "exit_losses": f"1:9.0000 3:{seen or loss:.4f}"}
        for seed, loss in enumerate(losses)
    ]
