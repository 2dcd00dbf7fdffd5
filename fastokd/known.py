"""Every name that a user may give, and where its code is. Nothing here imports torch.

``fastokd list`` reads the names alone; the module of a method or a model is imported when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# The module that registers each student: fastokd.models.FAMILY.
_FAMILIES = {
    "densenet": ["densenet_40_12", "densenet_40_12_uncompressed"],
    "googlenet": ["googlenet"],
    "resnet": [
        *[f"resnet{depth}" for depth in (8, 14, 18, 20, 32, 34, 44, 56, 110)],
        "resnet110_basic",
        "wrn_20_8",
    ],
    "vgg": ["vgg16", "vgg19"],
    "wide_resnet": [
        *("wrn_16_2", "wrn_16_2_basic", "wrn_28_4_basic", "wrn_28_10_basic", "wrn_40_1_basic"),
        *("wrn_40_2", "wrn_40_2_basic"),
    ],
}
MODELS = {name: f"fastokd.models.{module}" for module, names in _FAMILIES.items() for name in names}
METHODS = {
    "baseline": "fastokd.methods.baseline:Baseline",
    "cl_ilr": "fastokd.methods.cl_ilr:CLILR",
    "dist": "fastokd.methods.dist:DIST",
    "dkd": "fastokd.methods.dkd:DKD",
    "dml": "fastokd.methods.dml:DML",
    "ffsd": "fastokd.methods.ffsd:FFSD",
    "ind": "fastokd.methods.ind:Independent",
    "kd": "fastokd.methods.kd:KD",
    "kdcl": "fastokd.methods.kdcl:KDCL",
    "mcl": "fastokd.methods.mcl:MCL",
    "okddip": "fastokd.methods.okddip:OKDDip",
    "okddip_entropy": "fastokd.methods.okddip_ablations:OKDDipEntropy",
    "okddip_kd": "fastokd.methods.okddip_kd:OKDDipKD",
    "okddip_mean": "fastokd.methods.okddip_ablations:OKDDipMean",
    "okddip_no_two_level": "fastokd.methods.okddip_ablations:OKDDipNoTwoLevel",
    "okddip_random": "fastokd.methods.okddip_ablations:OKDDipRandom",
    "okddip_symmetric": "fastokd.methods.okddip_ablations:OKDDipSymmetric",
    "okdph": "fastokd.methods.okdph:OKDPH",
    "one": "fastokd.methods.one:ONE",
    "pcl": "fastokd.methods.pcl:PCL",
}
# fastokd.data.registry loads them.
DATASETS = (
    *("cifar10", "cifar100", "digits", "fashion_mnist", "glyphs", "imagefolder", "imagenet"),
    *("stl10", "svhn", "tiny_imagenet", "hf", "wds"),
)
# Of these a name may say where the set is: hf:PATH.
PLACED = ("hf", "wds")
# Of these the images have any size, and a recipe may crop and resize them as they are read.
STREAMED = ("hf", "imagefolder", "imagenet", "wds")
# The fields of RunOptions: where and how a recipe runs. A recipe has none of them.
RUN_OPTIONS = (
    *("out", "data_root", "download", "resume", "device", "precision", "teacher", "init", "engine"),
    *("impl", "apex", "compile", "memory_format", "capture", "streams", "accumulate"),
    *("checkpoint_activations", "clip_norm", "skip_nonfinite", "loader", "workers"),
    *("eval_every", "save_every_steps"),
    *("save_every_minutes", "max_steps", "overfit_batch", "parallel", "sync_bn", "deterministic"),
    *("show_augmentation", "tensorboard", "wandb", "quiet"),
)
# Which library decodes images on disk.
LOADERS = ("auto", "dali", "nvjpeg", "torchvision")
# Height and width of the largest image of a recipe, and of a student's file.
MOST_PIXELS = 4096


def list_models() -> list[str]:
    """The names of the students, those of :func:`fastokd.models.register_model` included.

    :func:`fastokd.models.create_model` takes these, and any classifier of another library behind
    its prefix: ``torchvision:mobilenet_v2``, ``timm:mobilenetv3_small_100``.
    """
    return sorted(MODELS)


def list_methods() -> list[str]:
    """The names of the methods; :func:`fastokd.methods.register_method` adds none to them."""
    return sorted(METHODS)


def list_datasets() -> list[str]:
    """The names that :func:`fastokd.data.load_dataset` takes."""
    return sorted(DATASETS)


def place_of(dataset: str) -> tuple[str, str]:
    """The kind of a data set and its place: of ``hf:PATH`` ``("hf", "PATH")``, of others their name and
    ""."""
    kind, _, place = dataset.partition(":")
    return (kind, place) if kind in PLACED else (dataset, "")


def load(where: str) -> Any:
    """``package.module:name``, imported."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


class Later:
    """A module that is imported when one of its attributes is first used."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)
