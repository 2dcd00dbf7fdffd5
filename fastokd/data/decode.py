"""Decodes image files to upright RGB with Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from fastokd.data.views import BACKGROUND, View, centre_boxes
from fastokd.data.waits import exhausted
from fastokd.errors import UserError

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
# Half a gigabyte in Pillow. The largest phone sensors have 108 million pixels.
MAX_PIXELS = 1 << 27
TOO_MANY = f"more than {MAX_PIXELS // 10**6} million pixels"
# Rows of a transparent picture that are composited at a time.
BAND = 256
ORIENTATION = 0x0112
# Of a PNG that libpng, which DALI decodes with, reads without a warning on stderr. It warns of many colour
# profiles, and of what is doubled or out of place among the others; no decoder here uses them.
PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"tEXt", b"IEND"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageBytes(io.BytesIO):
    """An encoded picture in memory, with its place for errors."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(data)
        self.where = where

    def __str__(self) -> str:
        return self.where


@contextmanager
def without_warnings() -> Iterator[None]:
    """Pillow's warnings add nothing to a fault that is reported. Filters are global to the process, so
    they are set around the threads that decode, and not in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_rgb(path: Path | ImageBytes, background: int = BACKGROUND) -> Image.Image:
    """The picture in a file or in memory, rotated by its EXIF orientation, on ``background``.

    Raises:
        UserError: it can't be read, or its format isn't supported.
        LoaderError: memory or file descriptors ran out.
    """
    try:
        with Image.open(path) as image:
            fault = fault_of(image)
            if not fault:
                return upright_rgb(image, background)
    except Image.DecompressionBombError:
        fault = TOO_MANY
    except Exception as error:
        no_more = exhausted(error, f"{path} was read")
        if no_more is not None:
            raise no_more from error
        # Decoders raise any exception for damaged files.
        why = " ".join(str(error).split())
        raise UserError(f"{path} can't be read as an image ({why}): replace it") from error
    raise UserError(f"{path}: {fault}; convert it to an 8-bit RGB JPEG or PNG, or remove it")


def fault_of(image: Image.Image) -> str:
    """Why an opened picture isn't supported, by its header; "" if it is."""
    width, height = image.size
    if image.format not in FORMATS:
        return f"a {image.format}, which isn't read"
    if image.mode.startswith(("I", "F")):
        return "more than 8 bits a channel"
    if image.mode not in MODES:
        return f"its colours are {image.mode}, which aren't read"
    if width * height > MAX_PIXELS:
        return TOO_MANY
    return ""


def is_plain(image: Image.Image) -> bool:
    """Whether all decoders agree on a picture that is opened but not loaded: an upright JPEG or PNG of
    8-bit grey or RGB, without transparency; a PNG without chunks that libpng warns of. Loads a PNG."""
    if image.mode not in ("L", "RGB") or image.format not in ("JPEG", "MPO", "PNG"):
        return False
    if image.format == "PNG":
        if not _chunks(image) <= PLAIN_CHUNKS or not _ends(image):
            return False
        raw = [tile[3] for tile in getattr(image, "tile", ())]
        image.load()  # chunks after the pixels may change their meaning
        alike = raw in (["L"], ["RGB"])  # of 8 bits
    else:
        # Components with these ids are YCbCr, unless Adobe's marker says otherwise.
        components = [layer[0] for layer in getattr(image, "layer", ())]
        ycbcr = image.info.get("adobe_transform", 1) == 1
        alike = components in ([1], [1, 2, 3]) and ycbcr
    return alike and not _transparent(image) and orientation(image) == 1


def _chunks(png: Image.Image) -> set[bytes]:
    """The kinds of a PNG's chunks, up to one that isn't plain."""
    file = getattr(png, "fp", None)
    if file is None:
        return {b""}
    place = file.tell()
    file.seek(8)  # behind the signature
    kinds: set[bytes] = set()
    while kinds <= PLAIN_CHUNKS and len(head := file.read(8)) == 8:
        kinds.add(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    file.seek(place)
    return kinds


def _ends(png: Image.Image) -> bool:
    """Whether a PNG ends in IEND, which other decoders than Pillow require."""
    file = getattr(png, "fp", None)
    if file is None:
        return False
    place = file.tell()
    file.seek(-min(12, file.seek(0, 2)), 2)
    end = file.read()
    file.seek(place)
    return end == b"\0\0\0\0IEND\xaeB`\x82"


def upright_rgb(image: Image.Image, background: int = BACKGROUND) -> Image.Image:
    """An opened picture in RGB, rotated upright."""
    image.load()  # sets a PNG's orientation, and rotates a TIFF
    rgb = _on_ground(image, background) if _transparent(image) else image.convert("RGB")
    turn = _UPRIGHT.get(orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _on_ground(image: Image.Image, level: int) -> Image.Image:
    """A picture with transparency composited in bands, since whole copies may take gigabytes."""
    ground = Image.new("RGB", image.size, (level,) * 3)
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        below = Image.new("RGBA", band.size, (level, level, level, 255))
        ground.paste(Image.alpha_composite(below, band).convert("RGB"), (0, top))
    return ground


def _transparent(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return "transparency" in image.info or "a" in (image.mode + palette).lower().replace("lab", "")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is missing or damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF from cameras and editors may be malformed
        return 1
    return found if found in _UPRIGHT else 1


def centre(image: Image.Image, view: View) -> np.ndarray:
    """The centre crop after a bilinear resize of the shorter side to ``view.resize``: uint8
    ``[S, S, 3]``. One resampling reads only the crop's pixels."""
    width, height = image.size
    corners = centre_boxes(np.array([[height, width]]), view)
    (top, left), (bottom, right) = (corner_12[0].tolist() for corner_12 in corners)
    box = (left, top, min(right, width), min(bottom, height))
    size = (view.image_size, view.image_size)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def grey_square(image: Image.Image, size: int) -> Image.Image:
    """The centre square in grey, ``size`` pixels wide."""
    return Image.fromarray(centre(image.convert("L"), View(size)))
