"""Draws the letters and digits of installed fonts: what ``fastokd prepare glyphs`` writes.

The fonts of one folder are a family. Of a family up to :data:`MOST_FONTS` fonts are used, in the order
of the hashes of their names; Type 1 fonts only if it has no OpenType or TrueType font. A font is used if

1. FreeType draws all 62 characters, each with ink,
2. at most :data:`MOST_EQUAL` of them are equal to another one: a font of capitals has 26,
3. its characters are those that other fonts draw: with each glyph and the mean of each class over all
   fonts scaled to length 1, at least :data:`LEAST_RECOGNISED` of the 62 glyphs are nearest to the mean
   of their own class. Fonts of symbols and ornaments have 0 to 0.2,
4. for val and test: no training font of another family has nearly the same pixels (:data:`MOST_ALIKE`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastokd.data.sets.glyphs import CHARACTERS, SIDE, Glyphs
from fastokd.errors import UserError
from fastokd.host.cpus import usable_cpus

# Debian's texlive-fonts-extra puts its fonts here, FOUNDRY/FAMILY/FONT in each.
TEXLIVE = Path("/usr/share/texlive/texmf-dist/fonts")
# Of the side: the rest is a border, so that a crop with padding 2 cuts no ink.
INK = 26
MOST_FONTS = 8
MOST_EQUAL = 6
LEAST_RECOGNISED = 0.4
# The cosine of two fonts' pixels: 1.000 for STIX and XITS, below 0.96 without a common ancestor.
MOST_ALIKE = 0.97
# Shares of the families whose fonts are for test and for val.
TEST, VAL = 0.2, 0.1
_BOXES_AT = 96


@dataclass(frozen=True)
class Rejected:
    """A font that isn't used, and why."""

    path: Path
    why: str


def draw_glyphs(fonts: Path, workers: int = 0) -> tuple[Glyphs, list[Rejected]]:
    """Every usable font below ``fonts``, drawn; and the fonts that aren't usable.

    Args:
        fonts: a folder with fonts at any depth.
        workers: processes; 0 for one per core.

    Raises:
        UserError: there is no folder ``fonts``, no usable font below it, or none left for a split.
    """
    if workers < 0:
        raise UserError(f"workers is {workers}: it must be at least 0")
    if not fonts.is_dir():
        raise UserError(
            f"there is no folder {fonts}: install Debian's texlive-fonts-extra, or give --fonts DIR"
        )
    families = {family: _chosen(found) for family, found in _by_family(fonts)}
    if (processes := workers or usable_cpus()) == 1:
        drawn = [_family(paths) for paths in families.values()]
    else:
        with ProcessPoolExecutor(processes, get_context("forkserver")) as pool:
            drawn = list(pool.map(_family, families.values(), chunksize=4))
    rejected = [font for _, refused in drawn for font in refused]
    names, glyphs = [], []
    for family, (usable, _) in zip(families, drawn, strict=True):
        names += [(family, path) for path, _ in usable]
        glyphs += [glyph for _, glyph in usable]
    if not glyphs:
        raise UserError(
            f"no font below {fonts} has the 62 letters and digits: give another --fonts"
        )
    glyphs_FKHW = np.stack(glyphs)
    known_F = recognised(glyphs_FKHW) >= LEAST_RECOGNISED
    rejected += [
        Rejected(path, "its glyphs aren't the letters that other fonts draw")
        for (_, path), known in zip(names, known_F, strict=True)
        if not known
    ]
    kept = [name for name, known in zip(names, known_F, strict=True) if known]
    glyphs_FKHW = glyphs_FKHW[known_F]
    trained_F = np.array([split_of(family) == "train" for family, _ in kept], dtype=bool)
    twin_F = ~trained_F & (_alike(glyphs_FKHW, trained_F) > MOST_ALIKE)
    rejected += [
        Rejected(path, "a training font of another family has nearly the same letters")
        for (_, path), twin in zip(kept, twin_F, strict=True)
        if twin
    ]
    kept = [name for name, twin in zip(kept, twin_F, strict=True) if not twin]
    made = Glyphs(
        glyphs_FKHW[~twin_F],
        tuple(family for family, _ in kept),
        tuple(path.name for _, path in kept),
        tuple(split_of(family) for family, _ in kept),
    )
    for split in ("train", "val", "test"):
        if split not in made.splits:
            raise UserError(
                f"of the {len(set(made.families))} families (folders) below {fonts} none falls into "
                f"{split}: give --fonts a folder with more of them"
            )
    return made, sorted(rejected, key=lambda font: font.path)


def split_of(family: str) -> str:
    """The split of a family's fonts, by the hash of its name: other families don't change it."""
    place = _hash(family) / 2**64
    return "test" if place < TEST else "val" if place < TEST + VAL else "train"


def recognised(glyphs_FKHW: np.ndarray) -> np.ndarray:
    """The share of each font's glyphs that are nearest to the mean of their class, ``[F]``."""
    unit_FKN = _unit(glyphs_FKHW.reshape(*glyphs_FKHW.shape[:2], -1).astype(np.float32))
    mean_KN = _unit(unit_FKN.mean(0))
    nearest_FK = (unit_FKN @ mean_KN.T).argmax(2)
    return (nearest_FK == np.arange(len(mean_KN))).mean(1)


def _alike(glyphs_FKHW: np.ndarray, trained_F: np.ndarray) -> np.ndarray:
    """Each font's largest cosine with a training font, ``[F]``."""
    unit_FN = _unit(glyphs_FKHW.reshape(len(glyphs_FKHW), -1).astype(np.float32))
    return (unit_FN @ unit_FN[trained_F].T).max(1, initial=-1.0)


def draw(path: Path) -> np.ndarray | str:
    """The glyphs of a font, uint8 ``[62, 32, 32]``, white on black, or why it has none.

    All have one size, the largest at which the longest glyph fits into :data:`INK` pixels, and one
    baseline; each is centred horizontally.
    """
    try:
        large = ImageFont.truetype(path, _BOXES_AT)
        boxes = []
        for one in CHARACTERS:
            left, top, right, bottom = large.getbbox(one, anchor="ls")
            if right <= left or bottom <= top:
                return f"{one} has no ink"
            boxes.append((left, top, right, bottom))
        left_K, top_K, right_K, bottom_K = np.array(boxes, np.float64).T
        top, bottom = top_K.min(), bottom_K.max()
        scale = INK / max(bottom - top, (right_K - left_K).max())
        font = ImageFont.truetype(path, scale * _BOXES_AT)
        x_K = (SIDE - scale * (left_K + right_K)) / 2
        y = (SIDE - scale * (top + bottom)) / 2
        glyphs: dict[str, np.ndarray] = {}
        different = set()
        for one, x in zip(CHARACTERS, x_K, strict=True):
            glyphs[one] = _drawn(one, font, x, y)
            different.add(glyphs[one].tobytes())
            if not glyphs[one].any():
                return f"{one} has no ink"
            if len(glyphs) - len(different) > MOST_EQUAL:
                return "characters are equal"
    except (OSError, ValueError, SyntaxError) as error:
        return f"FreeType can't draw it: {error}"
    return np.stack(list(glyphs.values()))


def _drawn(character: str, font: ImageFont.FreeTypeFont, x: float, y: float) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((x, y), character, fill=255, font=font, anchor="ls")
    return np.asarray(image)


def _by_family(fonts: Path) -> Iterator[tuple[str, list[Path]]]:
    suffixes = {".otf", ".ttf", ".pfb"}
    found = [path for path in fonts.rglob("*") if path.suffix.lower() in suffixes]
    by_name = sorted(found, key=lambda path: (path.parent.name, path.name, path))
    for family, paths in groupby(by_name, key=lambda path: path.parent.name):
        yield family, list(paths)


def _chosen(paths: Sequence[Path]) -> list[Path]:
    outlines = [path for path in paths if path.suffix.lower() != ".pfb"] or paths
    return sorted(outlines, key=lambda path: (_hash(path.name), path))


def _family(paths: Sequence[Path]) -> tuple[list[tuple[Path, np.ndarray]], list[Rejected]]:
    usable: list[tuple[Path, np.ndarray]] = []
    rejected = []
    for path in paths:
        if len(usable) == MOST_FONTS:
            break
        glyphs = draw(path)
        if isinstance(glyphs, str):
            rejected.append(Rejected(path, glyphs))
        else:
            usable.append((path, glyphs))
    return usable, rejected


def _unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
