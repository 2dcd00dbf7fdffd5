"""Tests of the device: a GPU where there is one.

``FASTOKD_GPU_TESTS_ON=cpu`` runs them on the CPU, so that the files themselves are tested: a graph
is a stand-in there, and nothing watches for waits.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the CPU in a dry run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("FASTOKD_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    pytest.skip("there is no GPU here")
