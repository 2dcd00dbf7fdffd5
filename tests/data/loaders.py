"""The loaders of images from disk; those of DALI are tested where it is installed."""

from __future__ import annotations

import pytest

from fastokd.data import dali

_MISSING = dali.why_not()
needs_dali = pytest.mark.skipif(_MISSING is not None, reason=f"no DALI: {_MISSING}")
LOADERS = (pytest.param("dali", marks=needs_dali), "torchvision")
