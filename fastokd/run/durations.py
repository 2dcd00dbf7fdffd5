"""Lengths of time, read and written."""

from __future__ import annotations

import math
import re

from fastokd.errors import UserError

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def seconds_of(text: str, option: str) -> float:
    """``90s``, ``30m`` (or ``30min``), ``12h``, ``7d`` or ``4w`` in seconds.

    Raises:
        UserError: it is written otherwise, or is 0; the message names ``option``.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|d|w)", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if seconds == 0.0:
        raise UserError(f"{option} is {text!r}: write a number and s, m, h, d or w, such as 24h")
    return seconds


def in_words(seconds: float) -> str:
    """``41 s``, ``12 min`` or ``3.1 h``."""
    if math.isinf(seconds):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
