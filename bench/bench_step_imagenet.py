"""OKDDip's network ResNet-18 at 224x224: a peer and a leader, batch 16."""

from __future__ import annotations

from collections.abc import Callable


def test_imagenet(claim: Callable[[str], None]) -> None:
    claim("imagenet")
