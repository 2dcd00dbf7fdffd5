"""Writes ``classify.py``: a program that classifies pictures with an export, without fastokd where the
export needs none. It shows how the file is loaded and how a picture is preprocessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastokd.data.preprocessing import Preprocessing

NAME = "classify.py"
# {..} are filled in; all of the program's own braces are doubled.
_PROGRAM = '''\
"""Classifies pictures: python classify.py picture.jpg ..."""

import json
import sys
from pathlib import Path

{imports}
from PIL import Image, ImageOps

file = Path(__file__).parent / {file!r}
{load}
names, shown = about["class_names"], about["preprocessing"]


def preprocess(path):
    """A picture as the network's input, {input}."""
    image = Image.open(path)
    if image.mode.startswith(("I", "F")) or image.mode == "LAB":
        raise ValueError(f"it has mode {{image.mode}}, and not 8 bits a channel")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*shown["background"], 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("RGB")
{geometry}
{values}


def centre(image, resize, crop):
    """The shorter side resized and the centre taken, in one step; Pillow's filter is antialiased."""
    w, h = image.size
    W, H = resize * w // min(w, h), resize * h // min(w, h)
    left, top = round((W - crop) / 2), round((H - crop) / 2)
    box = (left * w / W, top * h / H, (left + crop) * w / W, (top + crop) * h / H)
    box = (*box[:2], min(box[2], w), min(box[3], h))
    return image.resize((crop, crop), Image.Resampling.BILINEAR, box=box)


paths = sys.argv[1:]
if not paths or paths[0] in ("-h", "--help"):
    sys.exit(f"usage: python {{sys.argv[0]}} picture.jpg ...")
unread = 0
for path in paths:
    try:
        picture = preprocess(path)
    except Exception as error:
        print(f"{{path}} can't be read: {{error}}", file=sys.stderr)
        unread += 1
        continue
{run}
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    print(path)
    for c in shares.argsort()[::-1][:5]:
        print(f"  {{100 * shares[c]:5.1f}} %  {{names[c]}}")
if unread:
    sys.exit(2)
'''
_CENTRE = '    image = centre(image, shown["resize"], shown["crop_size"][0])'
_GREY = '    image = image.convert("L").convert("RGB")'
# The set's own small grey pictures; a picture of the input's size is taken as it is.
_NATIVE = """\
    image = image.convert("L")
    native, size = shown["native"], {size}
    if min(image.size) == size:
        grey = np.asarray(centre(image, size, size))
    else:
        steps = native["levels"] - 1
        small = np.asarray(centre(image, native["size"], native["size"]), dtype=np.float64)
        small = np.round(small * (steps / 255)) * (255 / steps)
{enlarge}
    image = np.stack([grey] * 3, axis=2).astype(np.uint8)"""
_BORDER = """\
        before = (size - native["size"]) // 2
        after = size - native["size"] - before
        grey = np.pad(np.round(small), (before, after))"""
_BICUBIC = """\
        # Bicubic interpolation with a = -0.75, as in torch and OpenCV.
        at = (np.arange(size) + 0.5) * native["size"] / size - 0.5
        weights = np.zeros((size, native["size"]))
        for k in range(-1, 3):
            d = abs(at - np.floor(at) - k)
            near, far = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3
            column = np.clip(np.floor(at).astype(int) + k, 0, native["size"] - 1)
            np.add.at(weights, (np.arange(size), column), np.where(d <= 1, near, far))
        grey = np.round(weights @ small @ weights.T).clip(0, 255)"""
_PIXELS = "    return np.asarray(image)[None]"
_VALUES = """\
    scale, mean, std = (shown["normalize"][name] for name in ("scale", "mean", "std"))
    x_HWC = (np.asarray(image) * scale - mean) / std
    return x_HWC.transpose(2, 0, 1)[None].astype(np.float32)"""
OF_TORCH = """\
    with torch.no_grad():
        logits = model(torch.tensor(picture))[0].numpy()"""
BESIDE = 'about = json.loads(file.with_name("student.json").read_text())'


def program(
    shown: Preprocessing,
    file: str,
    load: Sequence[str],
    *,
    about: dict[str, Any],
    run: str = OF_TORCH,
) -> str:
    """The program's text.

    Args:
        file: the exported file's name.
        load: Python statements that load the path ``file`` as ``model`` and what it says as ``about``.
        about: the export's ``student.json``.
        run: Python lines that compute ``logits`` ``[C]`` of the picture ``path``.
    """
    entry = about["preprocessing"]["input"]
    imports = [line for line in load if line.startswith("import ")]
    if shown.native_size:
        enlarge = _BORDER if shown.border else _BICUBIC
        geometry = _NATIVE.format(size=shown.input_size, enlarge=enlarge)
    else:
        geometry = "\n".join([*([_GREY] if shown.grey else []), _CENTRE])
    return _PROGRAM.format(
        imports="\n".join(["import numpy as np", *imports]),
        file=file,
        load="\n".join(line for line in load if line not in imports),
        input=f"{entry['dtype']} [1, {', '.join(map(str, entry['shape'][1:]))}]",
        geometry=geometry,
        values=_PIXELS if entry["dtype"] == "uint8" else _VALUES,
        run=run,
    )
