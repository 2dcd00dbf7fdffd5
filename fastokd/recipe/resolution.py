"""The size of training images, where it differs from that of evaluation or grows during a run.

Progressive resizing is FFCV's (libffcv/ffcv-imagenet, ``train_imagenet.py``): small images first, the
full training size after a ramp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastokd.errors import UserError
from fastokd.known import MOST_PIXELS
from fastokd.recipe.fields import at_least, at_most

# The sizes of a ramp are multiples of this.
STEP = 32


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """The size of training images."""

    train_size: Annotated[
        int,
        "The same for the training images alone, where they are streamed; 0 for `image_size`.",
        at_least(0),
        at_most(MOST_PIXELS),
    ] = 0
    first_size: Annotated[
        int,
        "Size of the first training images, which grow in multiples of 32 within `size_epochs`; 0 for one "
        "size.",
        at_least(0),
    ] = 0
    size_epochs: Annotated[
        tuple[int, ...],
        "The last epoch of `first_size` and the first one of the full size; a change of `epochs` scales "
        "them.",
    ] = ()


def training_size(recipe: Any, epoch: int) -> int:
    """Height and width of the training images in ``epoch``, from 0."""
    last = recipe.train_size or recipe.image_size
    if not recipe.first_size:
        return last
    begin, end = recipe.size_epochs
    if epoch <= begin:
        return recipe.first_size
    if epoch >= end:
        return last
    size = recipe.first_size + (last - recipe.first_size) * (epoch - begin) / (end - begin)
    return round(size / STEP) * STEP


def scaled_size_epochs(recipe: Any, epochs: int) -> tuple[int, ...]:
    """``size_epochs`` of a run of ``epochs``, whose last epoch has the full size if the recipe's has."""
    given = recipe.size_epochs
    begin_end = [round(epoch * epochs / recipe.epochs) for epoch in given]
    if given and given[1] < recipe.epochs:
        begin, end = begin_end
        return max(0, min(begin, epochs - 2)), min(end, epochs - 1)
    return tuple(begin_end)


def check_sizes(recipe: Any) -> None:
    """Raises UserError for sizes that contradict each other or the form of the data set."""
    if not recipe.first_size:
        return
    last = recipe.train_size or recipe.image_size
    if not STEP <= recipe.first_size <= last:
        raise UserError(
            f"first_size is {recipe.first_size}: it must be at least {STEP} and at most the size that it "
            f"grows to, {last}"
        )
    given = recipe.size_epochs
    if len(given) != 2 or not 0 <= given[0] <= given[1] <= recipe.epochs:
        raise UserError(
            f"size_epochs is {list(given)}: it must be two of the {recipe.epochs} epochs, the last one at "
            "first_size and the first one at the full size, such as [11,13]"
        )
