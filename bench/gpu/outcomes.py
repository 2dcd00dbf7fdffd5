"""A plugin of pytest: a line of JSON for each test as it begins and as it ends, in the file
$FASTOKD_OUTCOMES."""

from __future__ import annotations

import json
import os

import pytest

LINES, CHARACTERS = 15, 1500


def pytest_runtest_logstart(nodeid: str) -> None:
    """So that a test in which its process dies, or is killed, has a name."""
    _note({"test": nodeid, "outcome": "begun", "seconds": 0.0})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's own outcome, and a set-up or tear-down that wasn't passed."""
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
