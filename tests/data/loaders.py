"""The loaders of images from disk; DALI is tested where it is installed, nvJPEG's with libjpeg."""

from __future__ import annotations

import numpy as np
import pytest

from fastokd.data.disk import dali

_MISSING = dali.why_not()
needs_dali = pytest.mark.skipif(_MISSING is not None, reason=f"no DALI: {_MISSING}")
LOADERS = (pytest.param("dali", marks=needs_dali), "nvjpeg", "torchvision")

# Of levels from 0 to 255. DALI rounds once where Pillow rounds after each direction; and where the
# filter reaches beyond the image, DALI repeats the last pixel, which Pillow leaves out.
DALI_INNER, DALI_RIM = 2, 12
# The nvJPEG loader's resize is in float32 and rounds once. libjpeg decodes as Pillow, bit for bit.
NVJPEG = 1


def alike(loader: str, ours_HWC: np.ndarray, theirs_HWC: np.ndarray) -> bool:
    """Whether one plain image is another as ``loader`` decodes it."""
    apart = abs(np.asarray(ours_HWC).astype(int) - np.asarray(theirs_HWC).astype(int))
    if loader == "dali":
        return bool(apart.max() <= DALI_RIM and apart[1:-1, 1:-1].max() <= DALI_INNER)
    return bool(apart.max() <= (NVJPEG if loader == "nvjpeg" else 0))
