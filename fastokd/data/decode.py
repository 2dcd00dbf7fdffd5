"""Files as pictures: upright, in RGB, or refused by name. Everything that decodes one comes here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastokd.data.views import View, centre_boxes
from fastokd.errors import UserError

# Under transparent pixels: white, as pages and papers are.
BACKGROUND = 255
ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_rgb(path: Path, background: int = BACKGROUND) -> Image.Image:
    """The picture in a file, upright as its EXIF orientation says, on ``background``.

    Raises:
        UserError: it can't be read, or isn't a picture that is read.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path} has more than 8 bits a channel: convert it to 8")
            return upright_rgb(image, background)
    except UserError:
        raise
    except Exception as error:
        # Decoders of damaged files raise nearly anything; whatever it was, this file is at fault.
        raise UserError(f"{path} can't be read as an image ({error}): replace it") from error


def upright_rgb(image: Image.Image, background: int = BACKGROUND) -> Image.Image:
    """An opened picture in RGB, turned upright."""
    image.load()  # a PNG may say its orientation, and a TIFF turns itself, only now
    if _transparent(image):
        ground = Image.new("RGBA", image.size, (background,) * 3 + (255,))
        rgb = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _UPRIGHT.get(orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _transparent(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return "transparency" in image.info or "a" in (image.mode + palette).lower().replace("lab", "")


def orientation(image: Image.Image) -> int:
    """EXIF's, from 1 to 8; 1 where there is none or its note is damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of what cameras and editors leave there, not all can be parsed
        return 1
    return found if found in _UPRIGHT else 1


def centre(image: Image.Image, view: View) -> np.ndarray:
    """The shorter side to ``view.resize``, then the centre: uint8 ``[S, S, 3]``, bilinear.

    One resampling that reads the crop's pixels alone: a thin picture costs no more than a square.
    """
    width, height = image.size
    corners = centre_boxes(np.array([[height, width]]), view)
    (top, left), (bottom, right) = (corner_12[0].tolist() for corner_12 in corners)
    box = (left, top, min(right, width), min(bottom, height))
    size = (view.image_size, view.image_size)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def grey_square(image: Image.Image, size: int) -> Image.Image:
    """The centre square in grey, ``size`` pixels wide."""
    return Image.fromarray(centre(image.convert("L"), View(size)))
