"""The loaders of images from disk; those of DALI are tested where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from fastokd.data.disk import dali

_MISSING = dali.why_not()
needs_dali = pytest.mark.skipif(_MISSING is not None, reason=f"no DALI: {_MISSING}")
LOADERS = (pytest.param("dali", marks=needs_dali), "torchvision")

# Of levels from 0 to 255. DALI rounds once where Pillow rounds after each direction; and where the
# filter reaches beyond the image, DALI repeats the last pixel, which Pillow leaves out.
DALI_INNER, DALI_RIM = 2, 12


def as_dali(ours_HWC: np.ndarray, theirs_HWC: np.ndarray) -> bool:
    """Whether one image is another as DALI decodes it."""
    apart = abs(np.asarray(ours_HWC).astype(int) - np.asarray(theirs_HWC).astype(int))
    return bool(apart.max() <= DALI_RIM and apart[1:-1, 1:-1].max() <= DALI_INNER)
