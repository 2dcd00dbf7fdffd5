"""Baseline: one network trained on labels alone. Scores: its only row is -inf."""

from __future__ import annotations

from fastokd.methods.base import Needs
from fastokd.methods.ind import Independent


class Baseline(Independent):
    """CE of one network; with more students, of each independently."""

    needs = Needs(sharing=("network",), min_students=1)
