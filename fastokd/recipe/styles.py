"""Published training recipes for classifiers, as styles that any method's recipe can take.

A recipe's name may end in ``@STYLE``: ``okddip-network/resnet18/imagenet@a3`` trains OKDDip's cohort as A3
trains one network. The style replaces the paper's epochs, schedule, optimizer, augmentation and loss
settings; method, students, temperature and the ramp's share of the epochs stay. Settings of image sizes
apply only to data sets whose images have any size.

Where a source's code and its text differ, the values are the code's. What fastokd can't do as the source
does stands in docs/modern.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastokd.errors import unknown_name
from fastokd.known import STREAMED, place_of
from fastokd.recipe.recipe import Recipe, models

RSB = "ResNet strikes back, arXiv:2110.00476, Table 2"
FFCV = "libffcv/ffcv-imagenet, rn18_configs and train_imagenet.py"


@dataclass(frozen=True)
class Style:
    """A published recipe.

    Attributes:
        source: where its values are published.
        epochs: of training; the distillation ramp keeps its share of them.
        settings: fields of :class:`Recipe`.
        sized: fields for data sets whose images have any size.
        model_options: options of the students that have them (timm's and torchvision's names).
    """

    source: str
    epochs: int
    settings: Mapping[str, Any]
    sized: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)


# Its RandAugment is timm's `rand-m7-mstd0.5-inc1` (A1, A2) and `rand-m6-mstd0.5-inc1` (A3).
_RSB: dict[str, Any] = {
    "batch_size": 2048,
    "optimizer": "lamb",
    "schedule": "cosine",
    "warmup": "over",
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-4,
    "final_lr": 1e-6,
    "decay_norms": False,
    "criterion": "bce",
    "target_threshold": 0.2,
    "auto_augment": "timm_randaugment",
    "randaugment_ops": 2,
    "randaugment_std": 0.5,
    "mixup": 0.1,
    "cutmix": 1.0,
}
_CROPS = {"resized_crop": True, "crop_padding": 0}
_DEEP = {"drop_path_rate": 0.05, "stochastic_depth_prob": 0.05}
_FFCV: dict[str, Any] = {
    "batch_size": 1024,
    "lr": 0.5,
    "nesterov": False,
    "weight_decay": 5e-5,
    "decay_norms": False,
    "schedule": "linear",
    "schedule_by": "step",
    "warmup": "before",
    "warmup_epochs": 2.0,
    "warmup_lr": 5e-5,
    "label_smoothing": 0.1,
    "test_flip": True,
}
_FFCV_SIZED = {
    **_CROPS,
    "image_size": 256,
    "eval_resize": 293,
    "train_size": 192,
    "first_size": 160,
}

STYLES = {
    "a1": Style(
        f"{RSB}, A1",
        600,
        {
            **_RSB,
            "lr": 5e-3,
            "weight_decay": 0.01,
            "label_smoothing": 0.1,
            "randaugment_magnitude": 7,
            "mixup": 0.2,
            "repeats": 3,
        },
        {**_CROPS, "image_size": 224, "eval_resize": 235},
        _DEEP,
    ),
    "a2": Style(
        f"{RSB}, A2",
        300,
        {**_RSB, "lr": 5e-3, "weight_decay": 0.02, "randaugment_magnitude": 7, "repeats": 3},
        {**_CROPS, "image_size": 224, "eval_resize": 235},
        _DEEP,
    ),
    "a3": Style(
        f"{RSB}, A3",
        100,
        {**_RSB, "lr": 8e-3, "weight_decay": 0.02, "randaugment_magnitude": 6},
        {**_CROPS, "image_size": 224, "eval_resize": 235, "train_size": 160},
    ),
    "v2": Style(
        "torchvision's references/classification, ResNet50_Weights.IMAGENET1K_V2 (pytorch/vision#3995)",
        600,
        {
            "batch_size": 1024,
            "lr": 0.5,
            "nesterov": False,
            "weight_decay": 2e-5,
            "decay_norms": False,
            "schedule": "cosine",
            "warmup": "before",
            "warmup_epochs": 5.0,
            "warmup_lr": 5e-3,
            "label_smoothing": 0.1,
            "auto_augment": "trivialaugment",
            "random_erasing": 0.1,
            "mixup": 0.2,
            "cutmix": 1.0,
            "repeats": 4,
            # 1 - (1 - 0.99998) * 1024 images * 32 steps / 600 epochs, as train.py computes it.
            "ema": 1 - 2e-5 * 1024 * 32 / 600,
            "ema_warmup": False,
            "average_every": 32,
            "average_start": 5,
        },
        {**_CROPS, "image_size": 224, "eval_resize": 232, "train_size": 176},
    ),
    "ffcv16": Style(
        f"{FFCV}, rn18_16_epochs",
        16,
        _FFCV,
        {**_FFCV_SIZED, "size_epochs": (11, 13)},
    ),
    "ffcv88": Style(
        f"{FFCV}, rn18_88_epochs",
        88,
        _FFCV,
        {**_FFCV_SIZED, "size_epochs": (65, 76)},
    ),
    "ta": Style(
        "TrivialAugment, arXiv:2103.10158, for CIFAR (automl/trivialaugment, confs/wresnet40x2_cifar*_ta_wide*)",
        200,
        {
            "batch_size": 128,
            "lr": 0.1,
            "nesterov": True,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "schedule_by": "step",
            "auto_augment": "trivialaugment",
            "cutout": 16,
        },
    ),
    # Of pretrained students (--init): first their new heads alone, then all by a lower rate.
    "finetune": Style(
        "heads first as LP-FT, arXiv:2202.10054; Nesterov's momentum and cosine as arXiv:1805.08974, A.5",
        30,
        {
            "batch_size": 32,
            "lr": 5e-3,
            "head_lr": 5e-2,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "schedule_by": "step",
            "frozen_stages": -1,
            "frozen_epochs": 3,
            "normalise_by": "model",
        },
        {"image_size": 224},
    ),
}


def styled(base: Recipe, style: str) -> Recipe:
    """``base`` in the style called ``style``.

    Raises:
        UserError: there is no such style.
    """
    if style not in STYLES:
        raise unknown_name("style", style, STYLES)
    chosen = STYLES[style]
    changes = {"milestones": (), "warmup_epochs": 0.0, **chosen.settings}
    if place_of(base.dataset)[0] in STREAMED:
        changes |= chosen.sized
    if any(":" not in model for model in base.models):  # no library states their normalisation
        changes.pop("normalise_by", None)
    if not base.flip:  # a mirrored digit is none
        changes.pop("test_flip", None)
    options = {
        name: value
        for name, value in chosen.model_options.items()
        if all(name in models.option_defaults(model) for model in base.models)
    }
    return dataclasses.replace(
        base.with_epochs(chosen.epochs),
        model_options={**base.model_options, **options},
        **changes,
    )
