"""Validation and test images that are drawn from train, and the lists of files by which a run keeps them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastokd.data.balance import imbalanced
from fastokd.data.splits import DatasetSplits, draw_members, largest_remainder
from fastokd.errors import UserError
from fastokd.seeds import keyed_generator

# The share of each class for val and for test, of a folder without either, unless one is asked for.
DEFAULT = 0.1
# Seed of the draw; it doesn't depend on the recipe's seed.
SEED = 0
# Keys of the generators. Test images are drawn first.
_KEYS = {"test": "hold out test", "val": "hold out"}
# A run's file with its lists.
DATA = "data.json"
Share = int | float


def hold_out(
    splits: DatasetSplits, asked: Mapping[str, Share], kept: Mapping[str, Any] | None = None
) -> DatasetSplits:
    """``splits`` with a validation and a test split drawn from train, as ``asked``.

    A whole number is a count of images, shared out to the classes by largest remainder; a fraction is
    taken of each class, rounded, at least one image. A set with neither ``val`` nor ``test`` gets both,
    each of ``DEFAULT`` unless asked for. The draw depends only on the labels and on ``asked``.

    Args:
        splits: a test split without images is one that the set lacks.
        asked: 0 for none.
        kept: the :func:`listed` of a begun run. Its lists of files replace the draw.

    Raises:
        UserError: the set has the split already, too few images are left, or a listed file is gone.
    """
    own = {"test": splits.test, "val": splits.val or ()}
    if not any(map(len, own.values())):
        asked = {name: share or DEFAULT for name, share in asked.items()}
    drawn = {name: asked[name] for name in _KEYS if asked[name] and asked[name] != len(own[name])}
    for name, share in drawn.items():
        if len(own[name]) > 0:
            what = {"test": "test", "val": "validate"}[name]
            raise UserError(
                f"{name} is {share}, but {splits.name} comes with {len(own[name])} images to {what}: "
                "leave it 0"
            )
    if not drawn:
        return splits
    lists = {name: kept[name] for name in ("train", *drawn) if name in kept} if kept else {}
    if lists.keys() == {"train", *drawn}:
        places, note = _places(splits, lists)
    else:
        places, note = draw(splits.train.labels_N, drawn, splits.class_names), ""
    parts = {name: splits.train.select(indices) for name, indices in places.items()}
    splits = replace(
        splits,
        train=parts["train"],
        val=parts.get("val", splits.val),
        test=parts.get("test", splits.test),
        held_out=drawn,
    )
    if splits.train.paths_N is None:
        return splits
    why = "no val/ or test/ folder: images are split" if len(drawn) > 1 else "images are held out"
    counts = [f"{len(parts['train']):,} to train"]
    counts += [
        f"{len(parts[name]):,} to {verb} (--{name} {drawn[name]})"
        for name, verb in (("val", "validate"), ("test", "test"))
        if name in drawn
    ]
    said = f"{why} per class by a fixed seed, {', '.join(counts)}; data.json in the run lists them"
    return replace(splits, note="\n".join(filter(None, (said, note, splits.note))))


def draw(
    labels_N: Tensor, asked: Mapping[str, Share], class_names: Sequence[str]
) -> dict[str, Tensor]:
    """The ascending indices of each split of ``asked`` and, under ``"train"``, of all others.

    Raises:
        UserError: a share out of range, or one that leaves no image of a class to train on.
    """
    sizes_C = torch.bincount(labels_N)
    left_M = torch.arange(len(labels_N))
    found: dict[str, Tensor] = {}
    for name, share in asked.items():
        labels_M = labels_N[left_M]
        if isinstance(share, float):
            if not 0 < share < 1:
                raise UserError(f"{name} is {share}: a fraction must be above 0 and below 1")
            quota_C = (share * sizes_C.double() + 0.5).floor().long().clamp(min=1)
        else:
            quota_C = largest_remainder(labels_M, share, name)
        held_M = draw_members(labels_M, quota_C, keyed_generator(SEED, _KEYS[name]))
        found[name], left_M = left_M[held_M], left_M[~held_M]
    none_C = (torch.bincount(labels_N[left_M], minlength=len(sizes_C)) == 0) & (sizes_C > 0)
    if none_C.any():
        label = int(none_C.nonzero()[0])
        shares = " and ".join(f"{name} {share}" for name, share in asked.items())
        count = int(sizes_C[label])
        raise UserError(
            f"holding out {shares} leaves no image of class {class_names[label]!r} to train on (it has "
            f"{count} image{'' if count == 1 else 's'}): add images, remove the class, or hold fewer out"
        )
    return {"train": left_M, **found}


def listed(splits: DatasetSplits) -> dict[str, Any]:
    """What a run keeps of its data (``data.json``): the files of each split if some were drawn from train,
    the files that were left out, and the class counts of imbalanced splits; empty for a set without any."""
    facts: dict[str, Any] = {}
    if splits.held_out and splits.train.paths_N is not None:
        facts["held_out"] = dict(splits.held_out)
        for name in ("train", *splits.held_out):
            split = getattr(splits, name)
            if name == "train" and splits.whole_train is not None:  # a resumed run draws again
                split = splits.whole_train
            facts[name] = [os.fsdecode(path) for path in split.paths_N]
    if splits.left_out:
        facts["left_out"] = [{"path": path, "fault": fault} for path, fault in splits.left_out]
    if counts := imbalanced(splits):
        facts["class_counts"] = {"names": list(splits.class_names), **counts}
    return facts


def _places(
    splits: DatasetSplits, lists: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Tensor], str]:
    """The indices in train of each list's files, and a note on files that aren't in any."""
    assert splits.train.paths_N is not None
    index = {os.fsdecode(path): i for i, path in enumerate(splits.train.paths_N)}
    wanted = [path for paths in lists.values() for path in paths]
    gone = [path for path in wanted if path not in index]
    if gone:
        raise UserError(
            f"{len(gone):,} of the {len(wanted):,} files of this run can't be used any more (the first: "
            f"{gone[0]}): put them back, or give the --data-root that it was trained on"
        )
    places = {name: torch.tensor([index[path] for path in paths]) for name, paths in lists.items()}
    new = index.keys() - set(wanted)
    if not new:
        return places, ""
    were, are = ("file was", "isn't") if len(new) == 1 else ("files were", "aren't")
    return places, f"{len(new):,} {were} added since the run began and {are} used"
