"""OKDDip's network ResNet-32: four whole networks on CIFAR-100, batch 128."""

from __future__ import annotations

from collections.abc import Callable


def test_okddip_network(claim: Callable[[str], None]) -> None:
    claim("okddip_network")
