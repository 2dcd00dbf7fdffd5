"""One image of a split on disk by Pillow, as a batch has it: what both loaders share."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastokd.data.decode import centre, read_rgb
from fastokd.data.disk.split import DiskSplit


def see(split: DiskSplit, index: int, box: list[int] | None, *, flip: bool) -> Tensor:
    """Image ``index`` as it is trained on, or tested where there is no box: ``[S, S, 3]``.

    Raises:
        OSError: the file has changed since it was prepared.
        UserError: it can't be read.
    """
    view, path = split.view, split.path(index)
    if path.stat().st_size != int(split.bytes_N[index]):
        raise OSError(f"{path} has changed")
    image = read_rgb(path)
    if box is None:
        image_HWC = torch.tensor(centre(image, view))
    else:
        top, left, height, width = box
        crop_CHW = F.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        image_HWC = F.resize(crop_CHW, [view.image_size] * 2).permute(1, 2, 0)
    return image_HWC.flip(1) if flip else image_HWC
