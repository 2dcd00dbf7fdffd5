"""Image sets of Hugging Face's ``datasets``, saved on disk by ``save_to_disk``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastokd.data.packed.listing import Packed, numbered
from fastokd.errors import UserError

# Names of the columns, where a set has several of a kind.
IMAGES = ("image", "img")
LABELS = ("label", "labels")


def list_hf(root: Path) -> tuple[dict[str, Packed], tuple[str, ...]]:
    """The images of each split, by the set's own names, and the names of the classes.

    A set without splits is called train; a split without the column of classes has the class -1. The Arrow
    files are mapped, and no image is read: an image is the range of bytes that the file holds it in.

    Raises:
        UserError: ``datasets`` isn't installed; ``root`` isn't a saved set, or is damaged; it has no
            column of images or of classes, or several; images aren't in the files.
    """
    saved = _load(root)
    splits = dict(saved) if isinstance(saved, dict) else {"train": saved}
    if not splits:
        raise UserError(f"{root} has no splits: save the set again with save_to_disk")
    first = next(iter(splits.values()))
    image, label = _columns(root, first)
    names = _names(first, label)
    for split, of in splits.items():
        if image not in of.features or (label in of.features and _names(of, label) != names):
            raise UserError(
                f"the split {split!r} of {root} has another column of images or other classes than "
                f"{next(iter(splits))!r}: save all splits with the same features"
            )
    found = {
        split: _packed(root, split if isinstance(saved, dict) else "", of, image, label)
        for split, of in splits.items()
    }
    return found, names or numbered(root, found)


def _names(of: Any, label: str) -> tuple[str, ...]:
    """The names of the classes; none of whole numbers."""
    return tuple(getattr(of.features[label], "names", None) or ())


def _load(root: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"hf needs Hugging Face's datasets ({error}): install fastokd[hf]"
        ) from None
    try:
        return datasets.load_from_disk(str(root), keep_in_memory=False)
    except FileNotFoundError:
        raise UserError(
            f"{root} holds no set saved by Hugging Face's datasets: give the folder that "
            "save_to_disk wrote"
        ) from None
    except Exception as error:  # damaged files raise any exception
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{root} can't be loaded by datasets ({why}): save the set again with save_to_disk"
        ) from error


def _columns(root: Path, of: Any) -> tuple[str, str]:
    """The names of the images' column and of the classes'."""
    kinds = {name: type(feature).__name__ for name, feature in of.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = labels or [
        name
        for name in LABELS
        if kinds.get(name) == "Value" and str(of.features[name].dtype).startswith(("int", "uint"))
    ]
    chosen: list[str] = []
    for found, usual, what in ((images, IMAGES, "Image"), (labels, LABELS, "ClassLabel")):
        named = [name for name in usual if name in found] if len(found) > 1 else found
        if len(named) != 1:
            has = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise UserError(
                f"{root} has {len(found) or 'no'} columns of type {what} among {has}: keep one, with "
                f"remove_columns, or rename one to {usual[0]}"
            )
        chosen += named
    return chosen[0], chosen[1]


def _packed(root: Path, split: str, of: Any, image: str, label: str) -> Packed:
    """The images of one split, from its Arrow files."""
    import pyarrow as pa

    shards = tuple(Path(file["filename"]) for file in of.cache_files)
    names: list[str] = []
    places, labels = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)]
    for number, shard in enumerate(shards):
        with pa.memory_map(str(shard)) as mapped:
            whole = mapped.read_buffer()
            table = pa.ipc.open_stream(pa.BufferReader(whole)).read_all()
            chunks = table.column(image).chunks
            places += [_places(root, images, number, whole) for images in chunks]
            labels.append(_labels(shard, table, label))
            where = "/".join(filter(None, (split, shard.name)))
            names += [f"{where}/{row}" for row in range(len(table))]
    return Packed(shards, names, np.concatenate(labels), np.concatenate(places))


def _labels(shard: Path, table: Any, label: str) -> np.ndarray:
    """The class ids of one file's rows, int64; -1 without the column."""
    if label not in table.column_names:
        return np.full(len(table), -1)
    column = table.column(label)
    if column.null_count:
        raise UserError(f"{shard} has images without a class in {label!r}: filter them out")
    return np.asarray(column.to_numpy(), np.int64)


def _places(root: Path, images: Any, number: int, whole: Any) -> np.ndarray:
    """The shard, first byte and length of each image of one chunk."""
    encoded = images.field("bytes") if images.type.get_field_index("bytes") >= 0 else None
    if encoded is None or encoded.null_count or images.null_count:
        raise UserError(
            f"{root} has rows without the bytes of an image: save the set with save_to_disk where its "
            "files are, which copies them"
        )
    wide = np.int64 if str(encoded.type).startswith("large") else np.int32
    _, offsets, data = encoded.buffers()
    first = encoded.offset
    ends_N = np.frombuffer(offsets, wide)[first : first + len(encoded) + 1].astype(np.int64)
    base = data.address - whole.address if data is not None and len(ends_N) > 1 else 0
    if not 0 <= base <= whole.size:
        raise UserError(
            f"{root} holds compressed Arrow files: save the set again with save_to_disk"
        )
    shard_N = np.full(len(encoded), number, np.int64)
    return np.stack((shard_N, base + ends_N[:-1], np.diff(ends_N)), 1)
