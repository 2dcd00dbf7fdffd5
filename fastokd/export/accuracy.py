"""The accuracy of exported files: one pass over the test set with each one's own library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from fastokd.data import DatasetSplits, stream_of
from fastokd.device import cpu_name
from fastokd.export.formats import Classifier
from fastokd.host.console import console

BATCH = 256
# From this number of batches on, a bar shows the progress.
MANY = 20


@torch.no_grad()
def accuracy(
    classifiers: Mapping[str, Classifier], data: DatasetSplits, *, pixels: bool
) -> dict[str, Any]:
    """``accuracy`` of a card; docs/deployment.md describes its fields.

    Args:
        classifiers: for each format, a function from the network's input to logits ``[B, C]``.
        data: has the student's own preprocessing.
        pixels: the inputs are uint8 images ``[B, H, W, 3]``, otherwise normalised ``[B, 3, H, W]``.

    Raises:
        UserError: an image can't be read.
    """
    labels: list[Tensor] = []
    classes: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    stream = stream_of(data.test, min(BATCH, len(data.test)))
    with Progress(console=console(stderr=True), transient=True, disable=len(stream) < MANY) as bar:
        for images_BHWC, labels_B in bar.track(
            stream.batches(0), total=len(stream), description="test images"
        ):
            images_BHWC = images_BHWC.cpu()
            inputs = images_BHWC if pixels else data.preprocessing.normalized(images_BHWC)
            labels.append(labels_B.cpu())
            for name, classifier in classifiers.items():
                classes[name].append(classifier(inputs).argmax(1))
    labels_N = torch.cat(labels)
    C = data.num_classes
    images_C = torch.bincount(labels_N, minlength=C)
    found = {name: torch.cat(of_format) for name, of_format in classes.items()}
    shares = {name: _shares(classes_N, labels_N, images_C) for name, classes_N in found.items()}
    first, *others = found.values()
    agreement = {"agreement": (first == others[0]).double().mean().item()} if others else {}
    return {
        "how": "measured-cpu",
        "cpu": cpu_name(),
        "split": "test",
        "images": len(labels_N),
        "images_by_class": images_C.tolist(),
        "formats": shares,
        **agreement,
    }


def _shares(classes_N: Tensor, labels_N: Tensor, images_C: Tensor) -> dict[str, Any]:
    """Top-1 over all images and over each class's; null for a class without images."""
    right_N = classes_N == labels_N
    right_C = torch.bincount(labels_N[right_N], minlength=len(images_C))
    by_class = [
        right / images if images else None
        for right, images in zip(right_C.tolist(), images_C.tolist(), strict=True)
    ]
    return {"top1": right_N.double().mean().item(), "by_class": by_class}
