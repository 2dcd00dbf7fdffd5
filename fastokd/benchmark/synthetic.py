"""Drawn images, labels and teachers, for timing a step without a data set."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastokd.data import DatasetSplits, Split
from fastokd.data.preprocessing import preprocessing_of
from fastokd.methods import method_class
from fastokd.models import create_model
from fastokd.recipe.names import Recipe, recipe
from fastokd.student.teacher import STUDENT

CLASSES = {
    **dict.fromkeys(("cifar10", "digits", "fashion_mnist", "stl10", "svhn"), 10),
    **{"cifar100": 100, "glyphs": 62, "imagenet": 1000, "tiny_imagenet": 200},
}
# An image folder is taken to have as many classes as ImageNet.
FOLDER_CLASSES = 1000

# Mean and deviation of uniform noise.
MEAN, STD = (0.5, 0.5, 0.5), (0.289, 0.289, 0.289)


def num_classes(of: Recipe) -> int:
    """The number of classes of the recipe's data set, known without the data."""
    return CLASSES.get(of.dataset, FOLDER_CLASSES)


def drawn_batch(of: Recipe, seed: int = 0) -> Split:
    """One batch of noise and labels in the recipe's shape."""
    generator = torch.Generator().manual_seed(seed)
    shape = (of.batch_size, of.image_size, of.image_size, 3)
    return Split(
        torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(num_classes(of), shape[:1], generator=generator),
    )


def in_views(of: Recipe, images_NHWC: Tensor) -> Tensor:
    """The images as the recipe's step reads them: ``[V, N, H, W, 3]`` with the samples in another order in
    each view, or as they are."""
    if of.number_of_views is None:
        return images_NHWC
    return torch.stack([images_NHWC.roll(view, 0) for view in range(of.number_of_views)])


def drawn_splits(of: Recipe, batch: Split) -> DatasetSplits:
    """The batch as each split of the recipe's data set."""
    names = tuple(str(label) for label in range(num_classes(of)))
    shown = preprocessing_of(
        of.dataset, mean=MEAN, std=STD, image_size=of.image_size, eval_resize=of.eval_resize
    )
    return DatasetSplits(of.dataset, names, shown, batch, batch, batch)


def drawn_teacher(of: Recipe, data: DatasetSplits, folder: Path) -> Path | None:
    """Writes an untrained teacher into ``folder`` if the method needs one; returns its file."""
    if not method_class(of.method).needs.teacher:
        return None
    teacher = recipe(of.teacher)
    network = create_model(teacher.model, len(data.class_names), **teacher.model_options)
    _normalise(network, of.image_size)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    facts = {
        "model": teacher.model,
        "model_options": json.dumps(teacher.model_options),
        "class_names": json.dumps(data.class_names),
        **data.preprocessing.to_facts(),
    }
    save_file(state, folder / STUDENT, facts)
    return folder / STUDENT


def _normalise(network: nn.Module, size: int) -> None:
    """Takes the norms' running statistics from noise: with those of a new network each block doubles the
    variance, and a deep one's logits overflow fp16."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)))
