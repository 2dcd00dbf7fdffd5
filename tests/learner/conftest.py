"""Fixtures of the tests of training."""

from tests.run.tuned import cache

__all__ = ["cache"]
