"""One thread, so that tests time alike on shared machines; a cache that lasts for one run of the tests."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("offramp", deadline=None, derandomize=True)
settings.load_profile("offramp")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Exported graphs and compiled code are shared by the workers of one run, and by no other run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "offramp-cache"
    os.environ["OFFRAMP_CACHE"] = str(folder)
    return folder
