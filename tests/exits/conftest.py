"""A model for the tests of decoding."""

import pytest

from crt_lib import load_profile
from crt_lib.runs.trained import load_data
from crt_lib.train import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model that has learned a little, so that early heads often agree with the last one.

    In float64, in which no two tokens are equally good by chance.
    """
    profile = load_profile("smoke")
    data = load_data(profile)
    config = profile.model.replace(vocab_size=data.tokenizer.vocab_size)
    out = tmp_path_factory.mktemp("run")
    result = train(config, profile.train, data, out, progress=False)
    return result.model.eval().double()
