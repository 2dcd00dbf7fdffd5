"""Seeded damage to a file's bytes: flipped bits, cuts, repeats, and numbers that mean too much."""

from __future__ import annotations

import random

NUMBERS = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\x00" * 8,
)


def mutated(data: bytes, draw: random.Random, *, same_size: bool = False) -> bytes:
    """``data`` with one to four things wrong; half of them near its beginning, where headers are."""
    made = bytearray(data)
    kinds = ("flip", "overwrite") if same_size else ("flip", "overwrite", "cut", "insert", "repeat")
    for _ in range(draw.randint(1, 4)):
        near = draw.random() < 0.5
        at = draw.randrange(min(len(made), 200) if near else len(made)) if made else 0
        kind = draw.choice(kinds)
        if kind == "flip" and made:
            made[at] ^= 1 << draw.randrange(8)
        elif kind == "overwrite":
            new = draw.choice(NUMBERS)[: len(made) - at]
            made[at : at + len(new)] = new
        elif kind == "cut":
            del made[at : at + draw.choice((1, 4, 100, len(made)))]
        elif kind == "insert":
            made[at:at] = draw.choice((*NUMBERS, draw.randbytes(20)))
        else:
            made[at:at] = made[at : at + draw.randrange(1, 64)]
    return bytes(made)
