"""OKDDip's branch ResNet-32: three peers and a leader on CIFAR-100, batch 128."""

from __future__ import annotations

from collections.abc import Callable


def test_okddip_branch(claim: Callable[[str], None]) -> None:
    claim("okddip_branch")
