"""Baseline: one network that learns from labels alone. Scores: its only row -inf."""

from __future__ import annotations

from fastokd.methods.base import Needs
from fastokd.methods.ind import Independent


class Baseline(Independent):
    """CE; the networks of a larger cohort wouldn't know of each other."""

    needs = Needs(sharing=("network",), min_students=1)
