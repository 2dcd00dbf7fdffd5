"""What torchvision and timm state of the weights that they publish: file, classes, preprocessing.

Nothing is downloaded: :func:`installed` finds the files that the libraries keep in their caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastokd.errors import UserError
from fastokd.known import Later
from fastokd.models.libraries import resolve

models, timm, hub = Later("torchvision.models"), Later("timm"), Later("huggingface_hub")
# Its weights are of ImageNet's 1,000 classes.
ANY = "resnet18"


@dataclass(frozen=True)
class Published:
    """Weights that a library publishes for a network.

    Attributes:
        file: the file's name in the library's cache.
        classes: the number of their classes.
        input_size: height and width in pixels.
        eval_resize: the shorter side before the centre crop.
        mean, std: of the channels, for images in [0, 1].
        place: the repository of the file on the hub that timm loads it from, or "".
    """

    file: str
    classes: int
    input_size: int
    eval_resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    place: str = ""


def published(model: str, file: str = "") -> Published:
    """What the library states of its weights for ``model``, ``torchvision:NAME`` or ``timm:NAME``.

    ``file``: the name of a file of weights, which chooses among several; by default the library's
    own default.

    Raises:
        UserError: an unknown network, or the library publishes no weights for it.
    """
    resolve(model)
    known = list(_published(model))
    if not known:
        raise UserError(
            f"{model.partition(':')[0]} publishes no weights of {model}, which would state their mean, "
            "deviation and input size: name another network"
        )
    return next((one for one in known if one.file == file), known[0])


def normalisation_of(names: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels, for images in [0, 1], that the libraries state for students.

    Raises:
        UserError: their weights were trained with different ones.
    """
    stated = {name: published(name) for name in dict.fromkeys(names)}
    (first, one), *others = stated.items()
    for name, other in others:
        if (other.mean, other.std) != (one.mean, one.std):
            raise UserError(
                f"normalise_by is 'model', but {first} and {name} were trained with different means or "
                "deviations: set it to data"
            )
    return one.mean, one.std


def installed(model: str) -> Path | None:
    """The file of the library's weights in its cache, the default weights before others; or None."""
    resolve(model)
    for one in _published(model):
        path = _of_the_hub(one) if one.place else None
        found = path or Path(torch.hub.get_dir(), "checkpoints", one.file)
        if found.is_file():
            return found
    return None


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes in torchvision's words, in the order of all its weights."""
    return list(models.get_model_weights(ANY).DEFAULT.meta["categories"])


def imagenet_synonyms() -> list[set[str]]:
    """Further names of the 1,000 classes, WordNet's ids and words; empty where timm isn't installed."""
    try:
        known = timm.data.ImageNetInfo()
    except ImportError:
        return []
    said = zip(known.label_names(), known.label_descriptions(), strict=True)
    return [{wnid, *words.split(", ")} for wnid, words in said]


def _published(model: str) -> Iterator[Published]:
    prefix, _, arch = model.partition(":")
    if prefix == "timm":
        yield from _of_timm(arch)
        return
    weights = models.get_model_weights(arch)
    default = [weights.DEFAULT] if len(weights) else []
    for one in (*default, *(other for other in weights if other not in default)):
        shown = one.transforms()
        (size,), (resize,) = shown.crop_size, shown.resize_size
        classes = len(one.meta["categories"])
        file = one.url.rpartition("/")[2]
        yield Published(file, classes, size, resize, tuple(shown.mean), tuple(shown.std))


def _of_timm(arch: str) -> Iterator[Published]:
    cfg: Any = timm.models.get_pretrained_cfg(arch)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        return
    size = cfg.input_size[-1]
    file = cfg.hf_hub_filename or (cfg.url or "").rpartition("/")[2]
    resize = round(size / (cfg.crop_pct or 1.0))
    mean, std = tuple(cfg.mean), tuple(cfg.std)
    yield Published(file, cfg.num_classes, size, resize, mean, std, cfg.hf_hub_id or "")


def _of_the_hub(one: Published) -> Path | None:
    """The file in the cache of the Hugging Face hub."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = hub.try_to_load_from_cache(one.place, name)
        if isinstance(found, str):
            return Path(found)
    return None
