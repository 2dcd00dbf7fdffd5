"""Letters and digits of installed fonts, 62 classes, split by family: no test font was trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastokd.checkpoint import write_durably
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets.files import need_root
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import DiskError, UserError

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SIDE = 32
FILE = "glyphs.safetensors"
_MAKE = "fastokd prepare glyphs --out DIR makes it"


@dataclass(frozen=True)
class Glyphs:
    """The glyphs of F fonts, uint8 ``[F, 62, 32, 32]``, and each font's family, file and split."""

    glyphs_FKHW: np.ndarray
    families: tuple[str, ...]
    fonts: tuple[str, ...]
    splits: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the pixels and of the names."""
        names = json.dumps([self.families, self.fonts, self.splits]).encode()
        return hashlib.sha256(np.ascontiguousarray(self.glyphs_FKHW).tobytes() + names).hexdigest()

    def count(self, split: str) -> int:
        """Number of fonts of a split."""
        return self.splits.count(split)

    def write(self, folder: Path) -> Path:
        """Writes ``folder/glyphs.safetensors``; an existing one is replaced.

        Raises:
            DiskError: it can't be written.
        """
        path = folder / FILE
        names = {"families": self.families, "fonts": self.fonts, "splits": self.splits}
        facts = {name: json.dumps(found) for name, found in names.items()}
        content = save({"glyphs": self.glyphs_FKHW}, {**facts, "sha256": self.sha256})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, content)
        except OSError as error:
            raise DiskError(f"{path} can't be written: {error}") from error
        return path


def load_glyphs(root: Path | None) -> DatasetSplits:
    """The splits of ``root/glyphs.safetensors``: each font is 62 images, one per class.

    Raises:
        UserError: there is no such file, it is damaged, or a split has no font.
    """
    path = need_root("glyphs", root) / FILE
    found = _read(path)
    glyphs = torch.from_numpy(found.glyphs_FKHW)
    shown = preprocessing_of("glyphs")
    splits: dict[str, Split] = {}
    for name in ("train", "val", "test"):
        images_NHW = glyphs[[split == name for split in found.splits]].flatten(0, 1)
        if not len(images_NHW):
            raise UserError(f"{path} has no font of {name}: {_MAKE}")
        labels_N = torch.arange(len(CHARACTERS)).repeat(len(images_NHW) // len(CHARACTERS))
        splits[name] = Split(images_NHW[..., None].expand(-1, -1, -1, 3).contiguous(), labels_N)
    fonts = ", ".join(f"{found.count(name)} {name}" for name in splits)
    return DatasetSplits(
        name="glyphs",
        class_names=tuple(CHARACTERS),
        preprocessing=shown,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        note=f"{len(found.fonts)} fonts ({fonts}) from {path}, sha256 {found.sha256[:12]}",
    )


def _read(path: Path) -> Glyphs:
    try:
        with safe_open(path, "np") as file:
            facts, glyphs_FKHW = file.metadata() or {}, file.get_tensor("glyphs")
        names = (tuple(json.loads(facts[name])) for name in ("families", "fonts", "splits"))
        found = Glyphs(glyphs_FKHW, *names)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {_MAKE}") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}): {_MAKE}") from error
    counts = {len(glyphs_FKHW), len(found.families), len(found.fonts), len(found.splits)}
    if glyphs_FKHW.shape[1:] != (len(CHARACTERS), SIDE, SIDE) or len(counts) > 1:
        raise UserError(
            f"{path} holds {glyphs_FKHW.shape}, where 62 glyphs of 32x32 of each font are expected: {_MAKE}"
        )
    if found.sha256 != facts.get("sha256"):
        raise UserError(f"{path} is damaged, its sha256 isn't the one that it names: {_MAKE}")
    return found
