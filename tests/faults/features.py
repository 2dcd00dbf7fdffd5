"""Small recipes for the kills: of the papers' kind, and with each modern setting that a run may have.

Settings that can't hide each other share a run. The plain one trains on the digits, the others on forty
drawn images, in memory but for ``sizes``, which streams them: a step takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastokd.data.disk.prepare import prepare
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.options import RunOptions
from fastokd.train import train
from tests.data.make import write_folder

OPTIONS = RunOptions(
    quiet=True, engine="loop", precision="fp32", device="cpu", save_every_steps=1, eval_every=2
)
DML = "dml@2/resnet8/imagefolder"
PLAIN = "plain"


@dataclass(frozen=True)
class Feature:
    """A recipe's name, its settings beyond two epochs of batches of 8, and options of the run."""

    name: str
    settings: dict[str, Any]
    options: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return recipe(self.name, epochs=2, **{"batch_size": 8, **self.settings})


def _of(name: str, options: dict[str, Any] | None = None, **settings: Any) -> Feature:
    return Feature(name, settings, options or {})


FEATURES = {
    PLAIN: _of("okddip-branch@3/resnet8/digits", batch_size=100),
    "cosine": _of(DML, schedule="cosine", schedule_by="step", optimizer="lamb", lr=0.01),
    "one_cycle": _of(
        DML,
        **{"schedule": "one_cycle", "schedule_by": "step", "warmup": "before", "lr": 0.002},
        **{"warmup_epochs": 0.6, "optimizer": "adamw", "decay_norms": False},
    ),
    "frozen": _of(
        "okddip-branch@2/resnet8/imagefolder",
        frozen_stages=2,
        frozen_epochs=1,
        optimizer="lamb",
        lr=0.01,
    ),
    "head_lr": _of("baseline/resnet8/imagefolder", head_lr=0.01, frozen_stages=-1, frozen_epochs=1),
    "augmented": _of(DML, auto_augment="randaugment", random_erasing=0.5),
    "mixed": _of(DML, mixup=0.4, cutmix=1.0, mix_epochs=1, mix_each=True),
    "repeats": _of(DML, repeats=3),
    "balanced": _of(DML, balanced=True),
    "views": _of("okddip-network@2/resnet8/imagefolder", views="student"),
    "branch_views": _of("okddip-branch@2/resnet8/imagefolder", views="student", trunk_views="all"),
    "ema": _of(DML, ema=0.9, class_weights="balanced", average_students="all", average_every=2),
    "swa": _of(
        "okddip-branch@2/resnet8/imagefolder", swa=True, average_start=1, average_norms="recomputed"
    ),
    "sizes": _of(
        "baseline/resnet8/imagefolder",
        {"workers": 1, "loader": "torchvision"},
        **{"resized_crop": True, "crop_padding": 0, "image_size": 64},
        **{"train_size": 64, "first_size": 32, "size_epochs": [0, 1]},
    ),
    "dropped": _of("dml@2/timm:test_convnext/imagefolder", drop_path_rate=0.5, lr=0.01),
    "bce": _of(
        "ffsd-network@3/resnet8/imagefolder",
        **{"criterion": "bce", "label_smoothing": 0.1, "target_threshold": 0.05},
    ),
    "taught": _of("kd/resnet8/imagefolder", cache_teacher="plain"),
    "recomputed": _of("okddip-branch@2/resnet8/imagefolder", {"checkpoint_activations": True}),
}


def prepared(name: str, place: Path) -> tuple[Recipe, RunOptions]:
    """The recipe and the options of a feature, whose data and teachers are made below ``place``."""
    feature = FEATURES[name]
    if name == PLAIN:
        return feature.recipe, OPTIONS
    made: dict[str, Any] = {"data_root": place / "pictures"}
    if not made["data_root"].is_dir():
        write_folder(made["data_root"], count=20, size=(80, 72))
        prepare(made["data_root"], quiet=True)
    if name == "taught":
        made["teacher"] = [str(place / f"teacher{seed}") for seed in range(2)]
        for seed, folder in enumerate(made["teacher"]):
            if not Path(folder).is_dir():
                alone = recipe("baseline/resnet8/imagefolder", epochs=1, batch_size=8, seed=seed)
                train(alone, OPTIONS, out=folder, data_root=made["data_root"])
    return feature.recipe, replace(OPTIONS, **feature.options, **made)
