"""Batched operations on uint8 images: each image is given its own by its row of draws.

An image takes at most one operation a stage, and a stage runs up to four passes over the batch, which change
only the images whose operation they hold: one affine resampling for all geometric operations, one blend with
another image (black, the mean grey, the grey image, the blurred image), one look-up in a table of 256 levels a
channel, and one shift of the hue. The host reads no value, so a CUDA graph can contain this.

The results are torchvision's (``torchvision.transforms.v2.functional``, nearest interpolation, black fill) to a
grey level. Where a source pixel lies halfway between two pixels, either may be taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.data.augment.rows import BOX, STAGE
from fastokd.data.augment.settings import Augment
from fastokd.data.augment.spaces import BLENDS, GEOMETRIC, LOOKUPS, NUMBER

# Of the luma in torchvision's grey images.
LUMA = (0.2989, 0.587, 0.114)


def operate(
    augment: Augment, images_BHWC: Tensor, rows_BL: Tensor, *, together: bool | None = None
) -> Tensor:
    """The augmented images, uint8 ``[B, H, W, 3]``.

    Args:
        images_BHWC: uint8, after crop and flip.
        rows_BL: float32, as :func:`fastokd.data.augment.rows.draw_rows` draws them, on the images' device.
        together: runs each pass over all images; else each operation over its own, whose numbers the host
            reads. None for True on a GPU. The results are the same.
    """
    if together is None:
        together = images_BHWC.device.type != "cpu"
    at = 0
    for names in augment.stages:
        columns_BL = rows_BL[:, at : at + STAGE]
        stage = _stage if together else _apart
        images_BHWC = stage(images_BHWC, columns_BL, names)
        at += STAGE
    while at < rows_BL.shape[1]:
        images_BHWC = _fill_box(images_BHWC, rows_BL[:, at : at + BOX])
        at += BOX
    return images_BHWC


def _stage(images_BHWC: Tensor, columns_BL: Tensor, names: frozenset[str]) -> Tensor:
    """One operation of ``names`` for each image."""
    op_B, value_B, own_B, other_B = columns_BL[:, :4].unbind(1)
    if not names.isdisjoint(GEOMETRIC):
        images_BHWC = _resample(images_BHWC, columns_BL[:, 4:])
    if not names.isdisjoint(BLENDS):
        images_BHWC = _blend(images_BHWC, op_B, own_B, other_B, names)
    if not names.isdisjoint(LOOKUPS):
        images_BHWC = _look_up(images_BHWC, op_B, value_B, names)
    if "hue" in names:
        images_BHWC = _shift_hue(images_BHWC, op_B, value_B)
    return images_BHWC


def _apart(images_BHWC: Tensor, columns_BL: Tensor, names: frozenset[str]) -> Tensor:
    """The same, one operation after another on the images that it is drawn for."""
    done_BHWC = images_BHWC.clone()
    for name in sorted(names - {"identity"}):
        own_R = (columns_BL[:, 0] == NUMBER[name]).nonzero()[:, 0]
        if len(own_R) > 0:
            own_RHWC = images_BHWC.index_select(0, own_R)
            changed_RHWC = _stage(own_RHWC, columns_BL[own_R], frozenset([name]))
            done_BHWC.index_copy_(0, own_R, changed_RHWC)
    return done_BHWC


def _resample(images_BHWC: Tensor, matrix_B6: Tensor) -> Tensor:
    """Each pixel from the nearest one to where the matrix sends it, from the centre; black outside."""
    B, H, W, _ = images_BHWC.shape
    device = images_BHWC.device
    x_1W = torch.arange(W, device=device, dtype=torch.float32).sub_((W - 1) / 2)[None]
    y_H1 = torch.arange(H, device=device, dtype=torch.float32).sub_((H - 1) / 2)[:, None]
    xx, xy, x0, yx, yy, y0 = matrix_B6[:, :, None, None].unbind(1)
    column_BHW = (xx * x_1W + xy * y_H1 + x0).add_((W - 1) / 2).round_()
    row_BHW = (yx * x_1W + yy * y_H1 + y0).add_((H - 1) / 2).round_()
    inside_BHW = (column_BHW >= 0) & (column_BHW < W) & (row_BHW >= 0) & (row_BHW < H)
    row_BHW, column_BHW = row_BHW.clamp_(0, H - 1).int(), column_BHW.clamp_(0, W - 1).int()
    first_B11 = torch.arange(B, device=device, dtype=torch.int32)[:, None, None] * (H * W)
    pixel_BHW = row_BHW.mul_(W).add_(column_BHW).add_(first_B11)
    taken_BHWC = images_BHWC.reshape(-1, 3).index_select(0, pixel_BHW.view(-1)).view(B, H, W, 3)
    return taken_BHWC * inside_BHW[..., None]


def _blend(
    images_BHWC: Tensor, op_B: Tensor, own_B: Tensor, other_B: Tensor, names: frozenset[str]
) -> Tensor:
    """``own`` times the image plus ``other`` times its operation's other image; 1 and 0 change nothing."""
    x_BHWC = images_BHWC.float()
    y = x_BHWC.new_zeros(())
    if not names.isdisjoint(("color", "contrast")):
        r, g, b = x_BHWC.unbind(3)
        luma_BHW = (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2]).floor_()
        if "color" in names:
            y = luma_BHW[..., None] * _is(op_B, "color")
        if "contrast" in names:
            y = y + luma_BHW.mean((1, 2))[:, None, None, None] * _is(op_B, "contrast")
    drop = x_BHWC.new_zeros(())
    if "sharpness" in names:
        # As x + other * (blurred - x): a plain area then keeps its exact level.
        drop = _is(op_B, "sharpness")
        y = y + _blurred(images_BHWC) * drop
    own, other = own_B[:, None, None, None], other_B[:, None, None, None]
    return torch.addcmul(x_BHWC * own, y - x_BHWC * drop, other).clamp_(0, 255).to(torch.uint8)


def _blurred(images_BHWC: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels in which the middle one counts five times, rounded; the rim unchanged."""
    H, W = images_BHWC.shape[1:3]
    blurred_BHWC = images_BHWC.float()
    if H <= 2 or W <= 2:
        return blurred_BHWC
    levels = images_BHWC.short()
    across = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    square = across[:, :-2] + across[:, 1:-1] + across[:, 2:]
    blurred_BHWC[:, 1:-1, 1:-1] = (square + 4 * levels[:, 1:-1, 1:-1]).float().div_(13).round_()
    return blurred_BHWC


def _look_up(images_BHWC: Tensor, op_B: Tensor, value_B: Tensor, names: frozenset[str]) -> Tensor:
    """Each level from its image's and channel's table."""
    B, H, W, _ = images_BHWC.shape
    device = images_BHWC.device
    level_1L1 = torch.arange(256, device=device, dtype=torch.int32)[None, :, None]
    table_BLC = level_1L1.expand(B, 256, 3)
    op, value = op_B[:, None, None], value_B[:, None, None]
    # A level's place in the tables of all images.
    place_BPC = images_BHWC.view(B, H * W, 3).int().mul_(3)
    place_BPC += torch.arange(3, device=device, dtype=torch.int32)
    place_BPC += torch.arange(B, device=device, dtype=torch.int32)[:, None, None] * 768
    place = place_BPC.view(-1)
    if "posterize" in names:
        posterized = level_1L1 & value.int()
        table_BLC = torch.where(op == NUMBER["posterize"], posterized, table_BLC)
    if "solarize" in names:
        solarized = torch.where(level_1L1 >= value, 255 - level_1L1, level_1L1)
        table_BLC = torch.where(op == NUMBER["solarize"], solarized, table_BLC)
    if "invert" in names:
        table_BLC = torch.where(op == NUMBER["invert"], 255 - level_1L1, table_BLC)
    if not names.isdisjoint(("autocontrast", "equalize")):
        ones = torch.ones(1, device=device, dtype=torch.int32).expand(len(place))
        count = torch.zeros(B * 768, device=device, dtype=torch.int32).index_add_(0, place, ones)
        count_BLC = count.view(B, 256, 3)
        up_to_BLC = count_BLC.cumsum(1, dtype=torch.int32)
        highest_B1C = (up_to_BLC < H * W).sum(1, keepdim=True)
        if "autocontrast" in names:
            lowest_B1C = (up_to_BLC == 0).sum(1, keepdim=True)
            flat_B1C = highest_B1C == lowest_B1C
            scale_B1C = (highest_B1C - lowest_B1C).float().mul_(1 / 255).masked_fill_(flat_B1C, 1)
            stretched = ((level_1L1 - lowest_B1C).float() / scale_B1C).clamp_(0, 255).int()
            stretched = torch.where(flat_B1C, level_1L1, stretched)
            table_BLC = torch.where(op == NUMBER["autocontrast"], stretched, table_BLC)
        if "equalize" in names:
            # Pillow's rule, of the pixels below the image's highest level.
            step_B1C = (H * W - count_BLC.gather(1, highest_B1C)) // 255
            below_BLC = up_to_BLC - count_BLC
            divisor_B1C = step_B1C.clamp(min=1)
            equal = ((below_BLC + step_B1C // 2) // divisor_B1C).clamp_(0, 255)
            equal = torch.where(step_B1C == 0, level_1L1, equal)
            table_BLC = torch.where(op == NUMBER["equalize"], equal, table_BLC)
    flat = table_BLC.to(torch.uint8).reshape(-1)
    return flat.index_select(0, place).view_as(images_BHWC)


def _shift_hue(images_BHWC: Tensor, op_B: Tensor, turns_B: Tensor) -> Tensor:
    """The hue of HSV, moved by ``turns_B``."""
    x_BHWC = images_BHWC.float().div_(255)
    high_BHW, low_BHW = x_BHWC.amax(3), x_BHWC.amin(3)
    r, g, b = x_BHWC.unbind(3)
    span_BHW = high_BHW - low_BHW
    # A grey pixel has no hue; any will do, since its span is 0.
    divisor_BHW = torch.where(span_BHW == 0, 1.0, span_BHW)
    hue_BHW = torch.where(
        high_BHW == r,
        (g - b) / divisor_BHW,
        torch.where(high_BHW == g, 2 + (b - r) / divisor_BHW, 4 + (r - g) / divisor_BHW),
    )
    hue_BHW = hue_BHW + 6 * turns_B[:, None, None]
    # Each channel falls from the value by the span, over two of the six sixths of a turn, and rises again.
    channels = []
    for offset in (5, 3, 1):
        along = (hue_BHW + offset).remainder_(6)
        fall = torch.minimum(along, 4 - along).clamp_(0, 1)
        channels.append(high_BHW - span_BHW * fall)
    shifted_BHWC = torch.stack(channels, 3).clamp_(0, 1).mul_(255.999).to(torch.uint8)
    return torch.where((op_B == NUMBER["hue"])[:, None, None, None], shifted_BHWC, images_BHWC)


def _fill_box(images_BHWC: Tensor, columns_BL: Tensor) -> Tensor:
    """The image with a box of one colour; top, left, bottom, right, and the colour's levels."""
    H, W = images_BHWC.shape[1:3]
    device = images_BHWC.device
    top, left, bottom, right = columns_BL[:, :4, None, None].unbind(1)
    row_H1 = torch.arange(H, device=device)[:, None]
    column_W = torch.arange(W, device=device)
    inside_BHW = (row_H1 >= top) & (row_H1 < bottom) & (column_W >= left) & (column_W < right)
    colour_B11C = columns_BL[:, None, None, 4:].to(torch.uint8)
    return torch.where(inside_BHW[..., None], colour_B11C, images_BHWC)


def _is(op_B: Tensor, name: str) -> Tensor:
    """1 where an image's operation is ``name``, else 0: ``[B, 1, 1, 1]``."""
    return (op_B == NUMBER[name]).float()[:, None, None, None]
