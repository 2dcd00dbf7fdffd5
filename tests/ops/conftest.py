"""What the tests of the C++ ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastokd.ops import cpp


@pytest.fixture(params=["default", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest, cpp_ops: None) -> Iterator[str]:
    """The instruction set that the ops use, each that this CPU has."""
    before = cpp.capability()
    if not cpp.set_capability(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    cpp.set_capability(before)
