"""The settings that the papers' recipes have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastokd.known import MOST_PIXELS
from fastokd.recipe.fields import (
    BELOW_ONE,
    IMAGES,
    NOT_NEGATIVE,
    POSITIVE,
    at_least,
    at_most,
    between,
)

# Whose accuracy a run reports and selects its best epoch by.
Reported = Literal["leader", "mean", "kept", "ensemble_logits"]


@dataclass(frozen=True)
class PaperSettings:
    """What is trained on which data, and how the papers train it."""

    name: Annotated[str, "The recipe's name, METHOD[-FORM][-ensemble][@S]/MODEL/DATASET."]
    method: Annotated[str, "The method; the recipe's name says it."]
    model: Annotated[
        str,
        "The student, or several joined by `+`, one for each student of a mixed cohort, the leader's "
        "last; the recipe's name says it.",
    ]
    dataset: Annotated[
        str,
        "The data set, for `hf` and `wds` with its folder as in `hf:PATH`; the recipe's name says it.",
    ]
    sharing: Annotated[str, "`branch` (a shared trunk) or `network`; the recipe's name says it."]
    students: Annotated[int, "Networks trained, leader included.", at_most(64)]
    method_options: Annotated[
        dict[str, Any], "Options of the method; each can also be set by its own name."
    ] = field(default_factory=dict)
    model_options: Annotated[
        dict[str, Any], "Options of every student; each can also be set by its own name."
    ] = field(default_factory=dict)
    epochs: Annotated[
        int,
        "Epochs; a change scales every setting that counts epochs.",
        at_least(1),
        at_most(1_000_000),
    ] = 300
    batch_size: Annotated[int, "Images a step, over all ranks.", at_least(1), at_most(1 << 24)] = (
        128
    )
    lr: Annotated[float, "Learning rate at its highest, before any milestone.", POSITIVE] = 0.1
    momentum: Annotated[float, "Momentum of SGD, at least 0 and below 1.", BELOW_ONE] = 0.9
    nesterov: Annotated[bool, "Nesterov's momentum."] = True
    weight_decay: Annotated[
        float,
        "L2 penalty on all parameters; in adamw and lamb a decay apart from the gradient.",
        NOT_NEGATIVE,
    ] = 5e-4
    milestones: Annotated[
        tuple[int, ...],
        "Epochs (from 0) before which the learning rate is multiplied by `lr_decay`.",
    ] = (150, 225)
    lr_decay: Annotated[float, "Factor of the learning rate at each milestone.", POSITIVE] = 0.1
    warmup_epochs: Annotated[
        float,
        "Epochs in which the rate rises to lr, from lr / warmup_epochs or warmup_lr on; 0 for none.",
        NOT_NEGATIVE,
    ] = 0.0
    ramp_epochs: Annotated[
        float, "R of the distillation ramp, in epochs; 0 for none.", NOT_NEGATIVE
    ] = 80.0
    ramp_first: Annotated[
        int, "The ramp's count of the first epoch (0 in OKDDip, 1 in FFSD).", at_least(0)
    ] = 0
    crop_padding: Annotated[
        int, "Pixels of padding before the random crop; images in memory.", at_least(0)
    ] = 4
    crop_mode: Annotated[Literal["zeros", "reflect"], "The padding: `zeros` or `reflect`."] = (
        "zeros"
    )
    resized_crop: Annotated[
        bool, "Crop an area of the image and resize it instead (RandomResizedCrop)."
    ] = False
    flip: Annotated[bool, "Mirror half of the training images."] = True
    image_size: Annotated[
        int,
        "Height and width in pixels, for data sets of images of any size.",
        at_least(1),
        at_most(MOST_PIXELS),
    ] = 32
    eval_resize: Annotated[
        int,
        "Shorter side in pixels before the centre crop of a held-out image, and in memory of every "
        "image; 0 for none.",
        at_least(0),
    ] = 0
    val: Annotated[
        int | float,
        "Images held out of the training set, stratified by class and the same for every seed: a number, "
        "or a fraction of each class; 0 for none beyond the data set's own.",
        IMAGES,
        at_least(0),
    ] = 0
    test: Annotated[
        int | float,
        "The same for the test split of an image folder that has none; a folder with neither has 0.1 of "
        "each unless given.",
        IMAGES,
        at_least(0),
    ] = 0
    reported: Annotated[
        Reported,
        "Whose accuracy is the run's: the `leader`'s, the `mean` over students, the `kept` student's, "
        "or that of the peers' mean logits, `ensemble_logits`.",
    ] = "mean"
    teacher: Annotated[str, "The recipe that trains the teacher, where the method has one."] = ""
    seed: Annotated[int, "Seed of weights, order and augmentation.", between(0, 2**32 - 1)] = 0
