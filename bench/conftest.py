"""The claims' table at the end of a run of ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastokd.benchmark.claims import CLAIMS, InTurn, Outcome, measure, table

OUTCOMES: list[Outcome] = []
NOTES: list[str] = []


@pytest.fixture
def claim(benchmark: Any) -> Callable[[str], None]:
    """Measures one claim: pytest-benchmark times our steps; the published loop steps in between."""

    def check(name: str) -> None:
        found = CLAIMS[name]

        def run(loops: InTurn) -> None:
            benchmark.pedantic(loops.first, setup=loops.others, rounds=found.steps)

        outcome = measure(found, run)
        benchmark.extra_info.update(outcome.to_json())
        OUTCOMES.append(outcome)

    return check


@pytest.fixture
def note() -> Callable[[str], None]:
    """Prints a text below the table."""
    return NOTES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if OUTCOMES:
        terminalreporter.write_line(table(OUTCOMES))
        terminalreporter.write_line(OUTCOMES[0].ours.to_json()["how"])
    for text in NOTES:
        terminalreporter.write_line(text)
