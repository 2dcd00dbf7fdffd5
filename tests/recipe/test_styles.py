"""Published styles: their values against a table of the sources', and what a style keeps of its recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.resolution import training_size
from fastokd.recipe.styles import STYLES

PUBLISHED = json.loads(Path(__file__).with_name("published_styles.json").read_text("utf-8"))
NAME = "okddip-network/timm:resnet18/imagenet"


def test_every_style_has_its_source() -> None:
    assert PUBLISHED.keys() == STYLES.keys()


def rsb(of: Recipe) -> dict[str, Any]:
    """A recipe in the words of ResNet strikes back."""
    assert of.randaugment_ops == 2
    assert of.auto_augment == "timm_randaugment"
    assert of.warmup == "over"
    assert not of.decay_norms
    return {
        "train_resolution": training_size(of, 0),
        "test_resolution": of.image_size,
        "epochs": of.epochs,
        "batch_size": of.batch_size,
        "optimizer": of.optimizer.upper(),
        "lr": of.lr,
        "lr_decay": of.schedule,
        "weight_decay": of.weight_decay,
        "warmup_epochs": of.warmup_epochs,
        "warmup_lr": of.warmup_lr,
        "min_lr": of.final_lr,
        "label_smoothing": of.label_smoothing,
        "stochastic_depth": of.model_options.get("drop_path_rate", 0.0),
        "repeated_augmentation": of.repeats,
        "rand_augment": f"{of.randaugment_magnitude} / {of.randaugment_std}",
        "mixup": of.mixup,
        "cutmix": of.cutmix,
        "test_crop_ratio": round(of.image_size / of.eval_resize, 2),
        "loss": of.criterion.upper(),
        "target_threshold": of.target_threshold,
    }


def torchvision(of: Recipe) -> dict[str, Any]:
    """A recipe as a command of torchvision's references."""
    assert of.warmup == "before"
    assert of.final_lr == 0
    assert of.average_start == of.warmup_epochs
    assert not of.decay_norms
    # train.py: alpha = (1 - decay) * world_size * batch_size * steps / epochs
    updates = of.batch_size * of.average_every / of.epochs
    return {
        "gpus": 8,
        "--batch-size": of.batch_size // 8,
        "--lr": of.lr,
        "--lr-scheduler": {"cosine": "cosineannealinglr"}[of.schedule],
        "--lr-warmup-epochs": of.warmup_epochs,
        "--lr-warmup-method": "linear",
        "--lr-warmup-decay": of.warmup_lr / of.lr,
        "--auto-augment": {"trivialaugment": "ta_wide"}[of.auto_augment],
        "--epochs": of.epochs,
        "--random-erase": of.random_erasing,
        "--weight-decay": of.weight_decay,
        "--norm-weight-decay": 0.0,
        "--label-smoothing": of.label_smoothing,
        "--mixup-alpha": of.mixup,
        "--cutmix-alpha": of.cutmix,
        "--train-crop-size": training_size(of, 0),
        "--val-resize-size": of.eval_resize,
        "--val-crop-size": of.image_size,
        "--ra-reps": of.repeats,
        "--model-ema-steps": of.average_every,
        "--model-ema-decay": round(1 - (1 - of.ema) / updates, 8),
        "--momentum": of.momentum,
    }


def ffcv(of: Recipe) -> dict[str, Any]:
    """A recipe in FFCV's keys."""
    assert (of.schedule, of.schedule_by, of.warmup, of.final_lr) == ("linear", "step", "before", 0)
    start, end = of.size_epochs
    return {
        "lr": of.lr,
        "lr_peak_epoch": of.warmup_epochs,
        "first_rate": of.warmup_lr / of.lr,
        "start_ramp": start,
        "end_ramp": end,
        "min_res": training_size(of, 0),
        "max_res": training_size(of, of.epochs - 1),
        "batch_size": of.batch_size,
        "bn_wd": of.weight_decay if of.decay_norms else 0,
        "epochs": of.epochs,
        "label_smoothing": of.label_smoothing,
        "momentum": of.momentum,
        "weight_decay": of.weight_decay,
        "lr_tta": of.test_flip,
        "resolution": of.image_size,
        "crop_ratio": round(of.image_size / of.eval_resize, 2) + 0.005,
    }


def trivial_augment(of: Recipe) -> dict[str, Any]:
    """A recipe in the keys of TrivialAugment's repository."""
    return {
        "batch": of.batch_size,
        "epoch": of.epochs,
        "lr": of.lr,
        "lr_schedule": f"{of.schedule} by {of.schedule_by}",
        "nesterov": of.nesterov,
        "decay": of.weight_decay,
        "cutout": of.cutout,
        "augmentation_search_space": {"trivialaugment": "wide_standard"}[of.auto_augment],
    }


def fine_tuning(of: Recipe) -> dict[str, Any]:
    """A recipe in the words of papers on fine-tuning."""
    assert 0 < of.frozen_epochs < of.epochs / 2
    assert of.head_lr > of.lr
    return {
        "frozen_first": {-1: "all but the head"}[of.frozen_stages],
        "optimizer": of.optimizer,
        "momentum": of.momentum,
        "nesterov": of.nesterov,
        "lr_schedule": f"{of.schedule} by {of.schedule_by}",
        "preprocessing": {"model": "the pretrained weights' own"}[of.normalise_by],
    }


def test_own_students_are_fine_tuned_with_the_data_s_normalisation() -> None:
    assert recipe("dml/resnet20/imagefolder@finetune").normalise_by == "data"
    tuned = recipe("dml/timm:resnet18/imagefolder@finetune")
    assert (tuned.normalise_by, tuned.image_size) == ("model", 224)


WORDS = {"a": rsb, "v": torchvision, "f": ffcv, "t": trivial_augment}


@pytest.mark.parametrize("style", STYLES)
def test_a_style_has_its_sources_values(style: str) -> None:
    name = "okddip-network/wrn_40_2/cifar100" if style == "ta" else NAME
    words = {"ta": trivial_augment, "finetune": fine_tuning}.get(style) or WORDS[style[0]]
    published = {k: v for k, v in PUBLISHED[style].items() if k != "source"}
    ours = words(recipe(f"{name}@{style}"))
    assert ours.keys() == published.keys()
    for key, value in published.items():
        same = math.isclose(ours[key], value) if isinstance(value, float) else ours[key] == value
        assert same, (key, ours[key], value)


def test_a_style_keeps_the_method() -> None:
    plain, styled = recipe(NAME), recipe(f"{NAME}@a3")
    kept = ("method", "sharing", "students", "method_options", "reported", "seed", "dataset")
    assert all(getattr(plain, name) == getattr(styled, name) for name in kept)
    assert styled.name == f"{NAME}@a3"
    # The ramp keeps its share of the epochs.
    assert styled.ramp_epochs / styled.epochs == pytest.approx(plain.ramp_epochs / plain.epochs)
    assert recipe(styled.name) == styled


def test_sizes_are_only_for_images_of_any_size() -> None:
    small = recipe("dml/resnet8/cifar10@a3")
    assert (small.image_size, small.train_size, small.resized_crop) == (32, 0, False)
    assert recipe("dml/resnet18/imagefolder@a3").train_size == 160


@pytest.mark.parametrize("dataset", ["digits", "svhn", "fashion_mnist"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_fits_small_sets(style: str, dataset: str) -> None:
    plain, small = recipe(f"dml/resnet8/{dataset}"), recipe(f"dml/resnet8/{dataset}@{style}")
    assert small.flip == plain.flip
    assert small.test_flip == (plain.flip and style.startswith("ffcv"))


def test_stochastic_depth_is_for_students_that_have_it() -> None:
    assert "drop_path_rate" not in recipe("dml/resnet18/imagenet@a1").model_options
    mixed = "dml/timm:resnet18+resnet18/imagenet@a1"
    assert "drop_path_rate" not in recipe(mixed).model_options


def test_settings_change_a_style() -> None:
    changed = recipe(f"{NAME}@ffcv16", epochs=32, lr=0.25, seed=2)
    assert (changed.epochs, changed.lr, changed.seed) == (32, 0.25, 2)
    assert changed.size_epochs == (22, 26)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{NAME}@a4", "unknown style 'a4'"),
        (f"{NAME}@", "unknown style ''"),
        ("dml/resnet8@a3/digits", "@"),
    ],
)
def test_a_wrong_style_is_named(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(name)
