"""Each claim of the README, our step against the published one; the cost of S students over one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastokd.benchmark.claims import CLAIMS, growth, growth_specs, growth_table
from fastokd.benchmark.step import InTurn


@pytest.mark.parametrize("name", CLAIMS)
def test_claim(name: str, claim: Callable[[str], None]) -> None:
    claim(name)


def test_students(benchmark: Any, note: Callable[[str], None]) -> None:
    """Time grows no faster than multiply-accumulates."""
    with InTurn(growth_specs()) as loops:
        benchmark.pedantic(loops.first, setup=loops.others, rounds=10)
        found = growth(loops.timings())
    benchmark.extra_info.update(found)
    note(growth_table(found))
