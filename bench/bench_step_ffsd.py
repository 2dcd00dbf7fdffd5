"""FFSD's ResNet-32: two students and a leader on CIFAR-100, batch 128."""

from __future__ import annotations

from collections.abc import Callable


def test_ffsd(claim: Callable[[str], None]) -> None:
    claim("ffsd")
