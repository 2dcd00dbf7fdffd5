"""OKDDip's branch ResNet-32 against the published loop given bf16 and channels-last by hand."""

from __future__ import annotations

from collections.abc import Callable


def test_by_hand(claim: Callable[[str], None]) -> None:
    claim("by_hand")
