"""OKDDip's branch ResNet-32, float32 on both sides."""

from __future__ import annotations

from collections.abc import Callable


def test_fp32(claim: Callable[[str], None]) -> None:
    claim("fp32")
