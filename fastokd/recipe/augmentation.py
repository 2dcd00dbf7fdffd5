"""What the settings of augmentation may be, each for itself and together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError
from fastokd.recipe.fields import Bound, at_least, at_most, between

# Fields of a recipe that :class:`fastokd.data.Augment` has under the same names, beyond crop and flip.
OPERATIONS = (
    *("crop_scale", "crop_ratio", "vertical_flip"),
    *("auto_augment", "randaugment_ops", "randaugment_magnitude", "randaugment_std"),
    *("color_jitter", "random_erasing", "erasing_scale", "erasing_ratio", "cutout"),
)
# A recipe on images that are already drawn and cropped: what to replace.
UNCROPPED: dict[str, Any] = {
    "repeats": 1,
    "balanced": False,
    "images_per_class": 0,
    "train_size": 0,
    "first_size": 0,
    "size_epochs": (),
    "resized_crop": False,
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
}

SHARES = Bound(
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    "a smallest and a largest fraction, above 0 and at most 1, such as [0.08,1.0]",
)
RATIOS = Bound(
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] < float("inf"),
    "a smallest and a largest ratio above 0, such as [0.75,1.333]",
)
JITTER = Bound(
    lambda value: (
        len(value) == 4 and all(0 <= one < float("inf") for one in value) and value[3] <= 0.5
    ),
    "four numbers, for brightness, contrast, saturation and hue, at least 0 and the last at most 0.5",
)


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """Augmentation beyond crop and flip."""

    crop_scale: Annotated[
        tuple[float, ...],
        "Smallest and largest area of a resized crop, as fractions of the image's.",
        SHARES,
    ] = (0.08, 1.0)
    crop_ratio: Annotated[
        tuple[float, ...], "Smallest and largest width / height of a resized crop.", RATIOS
    ] = (3 / 4, 4 / 3)
    vertical_flip: Annotated[bool, "Turn half of the training images upside down."] = False
    auto_augment: Annotated[
        Literal[
            "none",
            "randaugment",
            "timm_randaugment",
            "trivialaugment",
            "cifar10",
            "imagenet",
            "svhn",
        ],
        "Automatic augmentation: RandAugment, timm's RandAugment, TrivialAugment (wide), or "
        "AutoAugment's policy for the data set of that name.",
    ] = "none"
    randaugment_ops: Annotated[
        int, "Operations of RandAugment on an image.", at_least(1), at_most(16)
    ] = 2
    randaugment_magnitude: Annotated[
        int, "Their strength, up to 30, or 10 for timm's.", between(0, 30)
    ] = 9
    randaugment_std: Annotated[
        float, "Standard deviation of the strength of timm's.", between(0, 10)
    ] = 0.5
    color_jitter: Annotated[
        tuple[float, ...],
        "Brightness, contrast and saturation, whose factors are at most so far from 1, and hue, which "
        "moves by at most so many turns.",
        JITTER,
    ] = (0.0, 0.0, 0.0, 0.0)
    random_erasing: Annotated[
        float, "Probability that a box of an image is filled with the mean colour.", between(0, 1)
    ] = 0.0
    erasing_scale: Annotated[
        tuple[float, ...],
        "Smallest and largest area of the box, as fractions of the image's.",
        SHARES,
    ] = (0.02, 0.33)
    erasing_ratio: Annotated[
        tuple[float, ...], "Smallest and largest height / width of the box.", RATIOS
    ] = (0.3, 3.3)
    cutout: Annotated[
        int,
        "Side in pixels of a square of the mean colour around a random pixel; 0 for none.",
        at_least(0),
    ] = 0
    test_flip: Annotated[
        bool, "Evaluate on the mean of the logits of each image and of its mirror image."
    ] = False


def check_augmentation(recipe: Any) -> None:
    """Raises UserError for settings of augmentation that contradict each other."""
    if recipe.auto_augment == "timm_randaugment" and recipe.randaugment_magnitude > 10:
        raise UserError(
            f"randaugment_magnitude is {recipe.randaugment_magnitude}: timm_randaugment takes at most 10, "
            "which is randaugment's 30"
        )
    smallest = recipe.first_size or recipe.train_size or recipe.image_size
    if recipe.cutout > smallest:
        raise UserError(
            f"cutout is {recipe.cutout}: it must be at most the training images' size, {smallest}"
        )
    if recipe.test_flip and not recipe.flip:
        raise UserError(
            "test_flip is true, but flip is false, so the students have seen no mirrored image: set "
            "flip to true or test_flip to false"
        )
