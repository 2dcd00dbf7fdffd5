"""Lists the images of a folder, their classes, and misplaced files.

A folder has ``train/CLASS/**`` and ``val/CLASS/**`` or ``test/CLASS/**``, in the order of torchvision's
``ImageFolder``; or ILSVRC's flat ``val/``, whose classes are in a ground-truth file; or it is unsplit, with
``CLASS/**`` directly below it or in ``train/`` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastokd.data.disk.ground_truth import read_ground_truth
from fastokd.data.disk.walk import Found, images_in, is_image, list_folder, walk_classes
from fastokd.errors import UserError

# The most notes shown at the start of a run.
SHOWN = 3
SPLITS = ("train", "val", "test")
NO_TEST = "No test/ folder: val/ is used as the test set."
# Names that folders of a split may have, besides ours.
OTHER_NAMES = ("valid", "validation")


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        classes: names of train's folders that hold an image, sorted by code point.
        files: (split, path from the root, class id) of each image; the class id is -1 if unknown. The
            images of an unsplit folder are train's.
        faults: why a file can't be used, by path.
        notes: folders that are misplaced, empty or left out.
        folders: modification time (ns) of every listed folder, by path.
    """

    classes: list[str] = field(default_factory=list)
    files: list[tuple[str, str, int]] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)

    def usable(self, split: str) -> list[tuple[str, int]]:
        """(path, class id) of the images of one split."""
        return [(p, label) for s, p, label in self.files if s == split and p not in self.faults]


def find_layout(root: Path, ground_truth: Path | None = None, *, labelled: bool = True) -> Layout:
    """Every image under ``root``.

    Args:
        root: the folder that holds ``train/``, or the folders of the classes.
        ground_truth: the classes of a flat ``val/``; None looks in the usual places.
        labelled: False lists a flat ``val/`` without its classes.

    Raises:
        UserError: there are fewer than two classes, ``val/`` or ``test/`` has a class that train
            lacks, a class has no usable file, ``val/`` stands without ``train/`` or under another
            name, a flat ``val/`` has no classes, or a folder can't be listed.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}: give the one that holds a folder for each class, or train/ "
            "and val/"
        )
    layout = Layout()
    if is_unsplit(root):
        _add_train(layout, root, "")
        return layout
    if not (root / "train").is_dir():
        raise UserError(f"there is no folder {root / 'train'}: give the folder that holds train/")
    _add_train(layout, root, "train")
    flat_val = False
    for split in SPLITS[1:]:
        folder = root / split
        if not folder.is_dir():
            continue
        names = _folders(layout, root, split)
        if names:
            _add_held_out(layout, root, split, names)
        elif split == "val":
            flat_val = True
            _add_flat(layout, root, ground_truth, labelled)
        else:
            layout.notes.append("test/ has no folders of classes: it is left out")
    if ground_truth is not None and not flat_val:
        raise UserError(
            f"{root / 'val'} has folders of classes, which replace {ground_truth}: "
            "leave the ground truth out"
        )
    if not any(split != "train" for split, _, _ in layout.files):
        _refuse_neighbours(root)
    _add_strays(layout, root, "", "outside train/ and val/")
    return layout


def is_unsplit(root: Path) -> bool:
    """Whether the folders of ``root`` are classes: none of ``train/``, ``val/`` and ``test/`` holds a
    folder."""
    return not any(
        entry.kind == "folder" and not entry.hidden
        for split in SPLITS
        if (root / split).is_dir()
        for entry in list_folder(root / split)
    )


def _refuse_neighbours(root: Path) -> None:
    """Raises UserError for folders beside a lone ``train/`` that may be meant to be read, too."""
    for entry in list_folder(root):
        if entry.kind != "folder" or entry.hidden or entry.name in SPLITS:
            continue
        near = root / entry.name
        if entry.name in OTHER_NAMES:
            raise UserError(
                f"{root} has no images in val/ or test/ beside train/: rename {near} to val"
            )
        if images_in(near, root):
            raise UserError(
                f"{root} has train/ with folders of classes, and images in {near} beside it: move "
                f"{near} into train/ if it is a class, or elsewhere"
            )


def shortened(notes: Sequence[str]) -> list[str]:
    """The first notes, and the number of the others."""
    more = len(notes) - SHOWN
    return [*notes[:SHOWN], *([f"and {more:,} more such notes"] if more > 0 else [])]


def held_out_folders(name: str, splits: Iterable[str], *, own_test: bool = True) -> dict[str, str]:
    """The folder of each split but train; ``splits`` are the folders that hold files.

    ``test/`` is the test split and ``val/`` the validation split. For ImageNet, and without
    ``test/``, ``val/`` is the test split, unless one is drawn from train (not ``own_test``). An unsplit
    folder has neither.
    """
    there = [split for split in ("test", "val") if split in splits]
    if name == "imagenet" or (there == ["val"] and own_test):
        return {"test": "val"}
    return {split: split for split in there}


def refuse_unusable_classes(
    folder: Path, classes: Iterable[str], files: Iterable[tuple[int, str]]
) -> None:
    """Raises UserError for a class of ``folder`` whose images are all unusable.

    ``files``: (class id, fault or "") of the folder's files.
    """
    faults: dict[int, str] = {}
    good: set[int] = set()
    for label, fault in files:
        if fault:
            faults.setdefault(label, fault)
        else:
            good.add(label)
    for label, name in enumerate(classes):
        if label not in good and label in faults:
            raise UserError(
                f"none of the images in {folder / name} can be used (the first: "
                f"{faults[label]}): replace them or remove the class"
            )


def _folders(layout: Layout, root: Path, base: str) -> list[str]:
    """The names of the visible folders in ``root / base``, sorted."""
    found = list_folder(root / base, layout.folders, root)
    names = []
    for entry in found:
        path = os.path.join(base, entry.name)
        if entry.hidden and entry.kind == "folder":
            layout.notes.append(f"{path} is hidden: it is left out")
        elif entry.kind == "broken" and not is_image(entry.name):
            layout.notes.append(f"{path} is a link that leads nowhere")
        elif entry.kind == "folder" and not base and _holds_runs(root / path):
            layout.notes.append(f"{path} holds runs of fastokd: it is left out")
        elif entry.kind == "folder" and not entry.hidden:
            names.append(entry.name)
    return names


def _holds_runs(folder: Path) -> bool:
    """Whether a folder beside the classes is a run, or holds some: their plots are no data."""
    return any(next(folder.glob(f"{below}recipe.json"), None) for below in ("", "*/", "*/*/"))


def _add_train(layout: Layout, root: Path, base: str) -> None:
    """Adds the classes in ``root / base``: ``base`` is "train", or "" for an unsplit folder."""
    folder = root / base
    names = _folders(layout, root, base)
    below = walk_classes(root, base, names, layout.folders, layout.notes)
    layout.classes = [name for name in names if below[name]]
    layout.notes += [
        f"{os.path.join(base, n)} holds no image: it is no class" for n in names if not below[n]
    ]
    if not base and layout.classes and {*layout.classes} <= {*SPLITS, *OTHER_NAMES}:
        first = folder / layout.classes[0]
        raise UserError(
            f"{first} has images but no folders of classes: sort them into {first / 'CLASS'}"
        )
    if len(layout.classes) < 2:
        near = layout.classes or names
        hint = f"; is {folder / near[0]} the folder that you mean?" if len(near) == 1 else ""
        count = len(layout.classes)
        raise UserError(
            f"{folder} has {count} folder{'' if count == 1 else 's'} with images: it needs at least 2, "
            f"one a class{hint}"
        )
    for label, name in enumerate(layout.classes):
        _add_class(layout, "train", name, label, below[name], base)
    labelled = [(label, layout.faults.get(path, "")) for _, path, label in layout.files]
    refuse_unusable_classes(folder, layout.classes, labelled)
    _add_strays(layout, root, base, "in no class's folder", split="train")


def _add_held_out(layout: Layout, root: Path, split: str, names: list[str]) -> None:
    labels = {name: label for label, name in enumerate(layout.classes)}
    below = walk_classes(root, split, names, layout.folders, layout.notes)
    for name in names:
        if name in labels:
            _add_class(layout, split, name, labels[name], below[name], split)
        elif below[name]:
            raise UserError(
                f"{root / split} has a class {name!r} that train/ lacks: add its images to "
                f"{root / 'train' / name}, or remove {root / split / name}"
            )
        else:
            layout.notes.append(f"{split}/{name} holds no image: it is no class")
    _add_strays(layout, root, split, "in no class's folder")
    _note_missing(layout, split)


def _note_missing(layout: Layout, split: str) -> None:
    """Notes the classes without images in ``split``."""
    there = {label for _, label in layout.usable(split)}
    missing = [name for label, name in enumerate(layout.classes) if label not in there]
    if missing:
        layout.notes.append(
            f"{split}/ has no image of {len(missing):,} of {len(layout.classes):,} classes (the "
            f"first: {missing[0]})"
        )


def _add_class(
    layout: Layout, split: str, name: str, label: int, images: list[Found], base: str
) -> None:
    """Adds one class of one split, which is in the folder ``base``; the folder of another class inside
    it is a fault."""
    classes = set(layout.classes)
    seen: set[str] = set()
    for image in images:
        inner = image.path.split("/")[2 if base else 1 : -1]
        misplaced = next((part for part in inner if part in classes and part != name), None)
        layout.files.append((split, image.path, label))
        if misplaced is not None:
            layout.faults[image.path] = f"in the folder of class {misplaced} inside that of {name}"
            if misplaced not in seen:
                seen.add(misplaced)
                where = os.path.join(base, name)
                layout.notes.append(f"{where}: holds a folder of class {misplaced}")
        elif image.fault:
            layout.faults[image.path] = image.fault


def _add_strays(layout: Layout, root: Path, base: str, fault: str, split: str = "") -> None:
    """Adds the images directly in ``root / base``, which have no class."""
    for image in images_in(root / base, root):
        layout.files.append((split or base or "none", image.path, -1))
        layout.faults[image.path] = fault


def _add_flat(layout: Layout, root: Path, ground_truth: Path | None, labelled: bool) -> None:
    images = images_in(root / "val", root)
    if not labelled:
        layout.files += [("val", image.path, -1) for image in images]
    if not images or not labelled:
        return
    labels = {name: label for label, name in enumerate(layout.classes)}
    names = [Path(image.path).name for image in images]
    truth = read_ground_truth(root, ground_truth, names, layout.classes)
    for name, image in zip(names, images, strict=True):
        known = truth.get(name)
        label = -1 if known is None else labels.get(known, -1)
        layout.files.append(("val", image.path, label))
        if image.fault:
            layout.faults[image.path] = image.fault
        elif known is None:
            layout.faults[image.path] = "the ground truth doesn't name it"
        elif label < 0:
            layout.faults[image.path] = f"train/ has no class {known}"
    _note_missing(layout, "val")
