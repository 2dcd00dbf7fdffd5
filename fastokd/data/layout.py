"""Where the images of a set lie and which class each has; what lies in the wrong place.

``train/CLASS/**`` and ``val/CLASS/**`` or ``test/CLASS/**``, in the order of torchvision's
``ImageFolder``; or ILSVRC's flat ``val/``, whose classes a ground-truth file has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fastokd.data.endings import is_image, left_out
from fastokd.data.ground_truth import read_ground_truth
from fastokd.errors import UserError


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        classes: sorted names of train's folders that hold an image.
        files: (split, path from the root, class id) of each image; the class id is -1 with a fault.
        faults: by path, why a file can't be used where it lies.
        notes: folders in the wrong place.
    """

    classes: list[str] = field(default_factory=list)
    files: list[tuple[str, str, int]] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_layout(root: Path, ground_truth: Path | None = None) -> Layout:
    """Every image under ``root``.

    Args:
        root: the folder that holds ``train/``.
        ground_truth: the classes of a flat ``val/``; None looks in the usual places.

    Raises:
        UserError: no ``train/`` with at least two classes, nothing to be tested on, a flat ``val/``
            without its classes.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the one that holds train/ and val/")
    if not (root / "train").is_dir():
        raise UserError(f"there is no folder {root / 'train'}: give the folder that holds train/")
    layout = Layout()
    _add_train(layout, root)
    flat_val = False
    for split in ("val", "test"):
        folder = root / split
        if not folder.is_dir():
            continue
        if _folders(folder):
            _add_held_out(layout, root, split)
        elif split == "val":
            flat_val = True
            _add_flat(layout, root, ground_truth)
        else:
            layout.notes.append("test/ has no folders of classes: it is left out")
    if ground_truth is not None and not flat_val:
        raise UserError(
            f"{root / 'val'} has folders of classes, which say more than {ground_truth}: "
            "leave the ground truth out"
        )
    if not any(split != "train" for split, _, _ in layout.files):
        raise UserError(f"{root} has no images in val/ or test/ beside train/: add some")
    _add_strays(layout, root, "", "outside train/ and val/")
    others = left_out(root, [root / split for split in ("train", "val", "test")])
    layout.notes += [others] if others else []
    return layout


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _images_in(folder: Path) -> list[str]:
    """Directly in it."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_file() and is_image(e.name))


def _images_below(folder: Path) -> list[Path]:
    """In torchvision's order: by folder, then by name."""
    return [
        Path(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if is_image(name)
    ]


def _add_train(layout: Layout, root: Path) -> None:
    train = root / "train"
    names = _folders(train)
    below = {name: _images_below(train / name) for name in names}
    layout.classes = [name for name in names if below[name]]
    for name in names:
        if not below[name]:
            layout.notes.append(f"train/{name} holds no image: it is no class")
    if len(layout.classes) < 2:
        nested = names and (train / names[0]).is_dir() and len(names) == 1
        hint = f"; is {train / names[0]} the folder that you mean?" if nested else ""
        raise UserError(
            f"{train} has {len(layout.classes)} folders with images: it needs at least 2, one a "
            f"class{hint}"
        )
    for label, name in enumerate(layout.classes):
        _add_class(layout, root, "train", name, label, below[name])
    _add_strays(layout, root, "train", "in no class's folder")


def _add_held_out(layout: Layout, root: Path, split: str) -> None:
    labels = {name: label for label, name in enumerate(layout.classes)}
    for name in _folders(root / split):
        below = _images_below(root / split / name)
        if name not in labels and below:
            layout.notes.append(f"{split}/{name}: train/ has no such class")
        _add_class(layout, root, split, name, labels.get(name, -1), below)
    _add_strays(layout, root, split, "in no class's folder")


def _add_class(
    layout: Layout, root: Path, split: str, name: str, label: int, images: list[Path]
) -> None:
    """One class of one split; a class's folder inside another's is in the wrong place."""
    classes = set(layout.classes)
    seen: set[str] = set()
    for image in images:
        path = image.relative_to(root).as_posix()
        inner = image.relative_to(root / split / name).parts[:-1]
        misplaced = next((part for part in inner if part in classes and part != name), None)
        layout.files.append((split, path, label))
        if label < 0:
            layout.faults[path] = f"train/ has no class {name}"
        elif misplaced is not None:
            layout.faults[path] = f"in the folder of class {misplaced} inside that of {name}"
            if misplaced not in seen:
                seen.add(misplaced)
                layout.notes.append(f"{split}/{name}: holds a folder of class {misplaced}")


def _add_strays(layout: Layout, root: Path, split: str, fault: str) -> None:
    for name in _images_in(root / split):
        path = f"{split}/{name}" if split else name
        layout.files.append((split or "none", path, -1))
        layout.faults[path] = fault


def _add_flat(layout: Layout, root: Path, ground_truth: Path | None) -> None:
    names = _images_in(root / "val")
    if not names:
        return
    labels = {name: label for label, name in enumerate(layout.classes)}
    truth = read_ground_truth(root, ground_truth, names, layout.classes)
    for name in names:
        path, known = f"val/{name}", truth.get(name)
        label = -1 if known is None else labels.get(known, -1)
        layout.files.append(("val", path, label))
        if known is None:
            layout.faults[path] = "the ground truth doesn't name it"
        elif label < 0:
            layout.faults[path] = f"train/ has no class {known}"
