"""Random generators seeded by a key."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of ``key`` alone, the same on every machine."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(key), "little"))


def keyed_numpy(*key: int | str) -> np.random.Generator:
    """NumPy's generator of ``key``, for distributions that torch doesn't draw from a generator."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(key), "little")))


def _digest(key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
