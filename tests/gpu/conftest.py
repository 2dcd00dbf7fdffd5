"""What only a GPU can show, and what the tests on one share.

``pytest tests/gpu`` on a machine with a GPU runs everything. Elsewhere a test skips, but for

- the Triton ops (``test_ops_*.py``) where ``TRITON_INTERPRET=1`` is set: the same tests on the CPU,
  the large cases shrunk (``tests/kernels/test_interpreted.py`` starts such a process);
- tests of the ``device`` fixture where ``FASTOKD_GPU_TESTS_ON=cpu`` is set: a dry run.

``FASTOKD_SHARE=i/n`` keeps every n-th of these tests from the i-th on (from 0). So n processes that
share a ``TRITON_CACHE_DIR`` compile all kernels, each its share, and run them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastokd.device import set_matmul_precision
from tests.ops.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = os.environ.get("FASTOKD_SHARE")
    if share is None:
        return
    first, count = map(int, share.split("/"))
    ours = [item for item in items if item.get_closest_marker("gpu")]
    kept = {*items} - {*ours} | {*ours[first::count]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the CPU in a dry run."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("FASTOKD_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    pytest.skip("needs a GPU, or FASTOKD_GPU_TESTS_ON=cpu for a dry run")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU under the interpreter."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 for the CPU")


@pytest.fixture
def poisoned_device(triton_device: torch.device) -> Iterator[torch.device]:
    """``triton_device``, where what a kernel doesn't write holds NaN; float32 is float32 there."""
    set_matmul_precision("fp32")
    with poisoned():
        assert torch.empty(3, device=triton_device).isnan().all()
        yield triton_device
