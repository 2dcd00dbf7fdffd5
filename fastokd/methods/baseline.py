"""Baseline: one network trained on labels alone. Scores: its only row is -inf."""

from __future__ import annotations

from dataclasses import replace

from fastokd.methods.ind import Independent


class Baseline(Independent):
    """CE of one network; with more students, of each independently."""

    needs = replace(Independent.needs, sharing=("network",))
