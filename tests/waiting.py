"""Waiting for another process: until it has done something, never for a while."""

import time
from collections.abc import Callable

PATIENCE = 600  # seconds until a test is given up, on the slowest machine; nothing is judged by it


def wait_for(condition: Callable[[], object], otherwise: str = "what must come did not") -> None:
    """Return when `condition` holds; it is asked ten times a second."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.1)
