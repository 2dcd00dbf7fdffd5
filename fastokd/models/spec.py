"""What is known of a student before it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastokd.models.student import Student


@dataclass(frozen=True)
class ModelSpec:
    """A named student.

    ``build(num_classes, **options)`` makes it with its published initialisation, drawn from
    torch's global generator; ``input_size`` is the height and width that it was published for.
    ``branch_options`` are the options that differ in the published branch form (VGG's dropout);
    ``library_options()`` gives the named options of another library's constructor, with defaults.
    """

    name: str
    build: Callable[..., Student]
    input_size: int
    about: str
    branch_options: Mapping[str, Any] = field(default_factory=dict)
    library_options: Callable[[], Mapping[str, Any]] = dict


def stated_size(options: Mapping[str, Any]) -> int | None:
    """The image size in a model's options, under our name for it, timm's or torchvision's."""
    for key in ("input_size", "img_size", "image_size"):
        size = options.get(key)
        if isinstance(size, tuple | list) and len({*size}) == 1:
            size = size[0]
        if isinstance(size, int) and size > 0:
            return size
    return None
