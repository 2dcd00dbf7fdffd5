"""Each claim of the README: our step beside the published one; and what S students cost over one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastokd.benchmark.claims import CLAIMS, Growth, growth_specs, growth_table
from fastokd.benchmark.step import InTurn


@pytest.mark.parametrize("name", CLAIMS)
def test_claim(name: str, claim: Callable[[str], None]) -> None:
    claim(name)


def test_students(benchmark: Any, note: Callable[[str], None]) -> None:
    """No more than their multiply-accumulates."""
    with InTurn(growth_specs()) as loops:
        benchmark.pedantic(loops.first, setup=loops.others, rounds=10)
        growth = Growth(tuple(loops.timings()))
    benchmark.extra_info.update(growth.to_json())
    note(growth_table(growth))
