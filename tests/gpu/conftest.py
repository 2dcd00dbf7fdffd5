"""Tests of the device: ``pytest tests/gpu`` on a machine with a GPU runs them all.

Elsewhere they skip, but for

- the tests of ``device`` where ``FASTOKD_GPU_TESTS_ON=cpu`` is set: they run on the CPU, so that the
  files themselves are tested: a graph is a stand-in there, and nothing watches for waits;
- the Triton ops (``test_ops_*.py``) where ``TRITON_INTERPRET=1`` is set: the same tests under the
  interpreter, the large cases shrunk (``tests/kernels/test_interpreted.py`` starts such a process).

``FASTOKD_SHARE=i/n`` keeps every n-th of these tests from the i-th on, counted from 0. So n processes
that share a ``TRITON_CACHE_DIR`` compile and run all kernels, each its share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastokd.device import set_matmul_precision
from tests.ops.poison import poisoned


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = os.environ.get("FASTOKD_SHARE")
    if share is None:
        return
    first, count = map(int, share.split("/"))
    ours = [item for item in items if item.get_closest_marker("gpu")]
    left_out = {*ours} - {*ours[first::count]}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the CPU in a dry run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("FASTOKD_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    pytest.skip("there is no GPU here")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton's kernels run: the GPU, or the CPU under the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("there is no GPU here, and kernels aren't interpreted (TRITON_INTERPRET=1)")


@pytest.fixture
def poisoned_device(triton_device: torch.device) -> Iterator[torch.device]:
    """``triton_device``, where what a kernel doesn't write holds NaN and float32 isn't TF32."""
    set_matmul_precision("fp32")
    with poisoned():
        assert torch.empty(3, device=triton_device).isnan().all()
        yield triton_device
