"""What a recipe may change in its training set: how many of its images, and how many wrong labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from fastokd.recipe.fields import BELOW_ONE, Bound

SHARE = Bound(lambda value: math.isfinite(value) and 0 < value <= 1, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class TrainingSetSettings:
    """Fewer training images, and wrong labels; validation and test images stay as they are."""

    fraction: Annotated[
        float,
        "Share of the training images of each class that is used, at least one image; the draw follows "
        "the seed, and a smaller share is a part of a larger one.",
        SHARE,
    ] = 1.0
    label_noise: Annotated[
        float,
        "Share of the training images whose label is another class, drawn uniformly by the seed "
        "(symmetric noise).",
        BELOW_ONE,
    ] = 0.0
