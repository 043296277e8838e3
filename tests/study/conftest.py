"""Trainings of a search in this process, which need not be started anew."""

import concurrent.futures

import pytest
import torch


@pytest.fixture
def here(monkeypatch):
    """Trials run one after another in this process."""

    class Here(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, jobs, context, initializer):
            super().__init__(1)

    threads = torch.get_num_threads()
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Here)
    yield
    torch.set_num_threads(threads)
