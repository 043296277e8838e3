"""What every test shares: a cache of its own, one torch thread, the same examples every time."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("crt", deadline=None, derandomize=True, database=None)
settings.load_profile("crt")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Subprocesses and kernels inherit it; what the user has cached is neither read nor changed."""
    before = os.environ.get("CRT_CACHE_ROOT")
    os.environ["CRT_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["CRT_CACHE_ROOT"]
    else:
        os.environ["CRT_CACHE_ROOT"] = before
