"""Fixtures of the tests of training."""

from tests.training.tuned import cache

__all__ = ["cache"]
