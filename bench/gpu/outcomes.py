"""A pytest plugin: writes a line of JSON to the file $FASTOKD_OUTCOMES when a test begins and when it ends."""

from __future__ import annotations

import json
import os

import pytest

LINES, CHARACTERS = 15, 1500


def pytest_runtest_logstart(nodeid: str) -> None:
    """Records the test's name, in case its process dies."""
    _note({"test": nodeid, "outcome": "begun", "seconds": 0.0})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Records a test's outcome, or a failed set-up or tear-down."""
    if report.when != "call" and report.passed:
        return
    found: dict[str, object] = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
    }
    if report.failed:
        text = report.longreprtext.strip()
        found["error"] = "\n".join(text.splitlines()[-LINES:])[-CHARACTERS:]
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash is not None else text
        found["why"] = said.splitlines()[0] if said else ""
    elif report.skipped and isinstance(report.longrepr, tuple):
        found["error"] = str(report.longrepr[2])
    _note(found)


def _note(found: dict[str, object]) -> None:
    with open(os.environ["FASTOKD_OUTCOMES"], "a") as file:
        file.write(json.dumps(found) + "\n")
