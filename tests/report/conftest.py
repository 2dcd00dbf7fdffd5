"""The pages of these tests have their figures."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _with_figures(figures: None) -> None:
    pass
