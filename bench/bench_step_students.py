"""What S students cost over one: no more than their multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastokd.benchmark.claims import Growth, growth_specs, growth_table
from fastokd.benchmark.step import InTurn


def test_students(benchmark: Any, note: Callable[[str], None]) -> None:
    with InTurn(growth_specs()) as loops:
        benchmark.pedantic(loops.first, setup=loops.others, rounds=10)
        growth = Growth(tuple(loops.timings()))
    benchmark.extra_info.update(growth.to_json())
    note(growth_table(growth))
