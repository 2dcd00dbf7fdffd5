"""Batched operations on uint8 images: each image is given its own by its row of draws.

An image takes at most one operation a stage, and a stage runs up to four passes over the batch, which change
only the images whose operation they hold: one affine resampling for all geometric operations, one blend with
another image (black, the mean grey, the grey image, the blurred image), one look-up in a table of 256 levels a
channel, and one shift of the hue. The host reads no value, so a CUDA graph can contain this.

The results are torchvision's (``torchvision.transforms.v2.functional``, nearest interpolation, black fill) to a
grey level. Where a source pixel lies halfway between two pixels, either may be taken. Those of timm's RandAugment
are Pillow's, bilinear and filled with the mean colour, to a grey level.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data.augment.rows import BOX, STAGE
from fastokd.data.augment.settings import Augment
from fastokd.data.augment.spaces import BLENDS, GEOMETRIC, LOOKUPS, NUMBER

# Of the luma in torchvision's grey images; Pillow's are rounded, torchvision's cut.
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
        images_BHWC = stage(images_BHWC, columns_BL, names, augment)
        at += STAGE
    while at < rows_BL.shape[1]:
        fill = _fill_boxes if together else _fill_each_box
        images_BHWC = fill(images_BHWC, rows_BL[:, at : at + BOX])
        at += BOX
    return images_BHWC


def _stage(
    images_BHWC: Tensor, columns_BL: Tensor, names: frozenset[str], augment: Augment
) -> Tensor:
    """One operation of ``names`` for each image."""
    op_B, value_B, own_B, other_B = columns_BL[:, :4].unbind(1)
    if not names.isdisjoint(GEOMETRIC):
        matrix_B6 = columns_BL[:, 4:]
        if augment.timm:
            images_BHWC = _interpolate(images_BHWC, op_B, matrix_B6, augment.fill)
        else:
            images_BHWC = _resample(images_BHWC, matrix_B6)
    if "vertical_flip" in names:
        images_BHWC = _turn_over(images_BHWC, op_B)
    if not names.isdisjoint(BLENDS):
        images_BHWC = _blend(images_BHWC, op_B, own_B, other_B, names, pillow=augment.timm)
    if not names.isdisjoint(LOOKUPS):
        images_BHWC = _look_up(images_BHWC, op_B, value_B, names)
    if "hue" in names:
        images_BHWC = _shift_hue(images_BHWC, op_B, value_B)
    return images_BHWC


def _apart(
    images_BHWC: Tensor, columns_BL: Tensor, names: frozenset[str], augment: Augment
) -> Tensor:
    """The same, one operation after another on the images that it is drawn for."""
    done_BHWC = images_BHWC.clone()
    for name in sorted(names - {"identity"}):
        own_R = (columns_BL[:, 0] == NUMBER[name]).nonzero()[:, 0]
        if len(own_R) > 0:
            own_RHWC = images_BHWC.index_select(0, own_R)
            changed_RHWC = _stage(own_RHWC, columns_BL[own_R], frozenset([name]), augment)
            done_BHWC.index_copy_(0, own_R, changed_RHWC)
    return done_BHWC


def _resample(images_BHWC: Tensor, matrix_B6: Tensor) -> Tensor:
    """Each pixel from the nearest one to where the matrix sends it, from the centre; black outside."""
    B, H, W, _ = images_BHWC.shape
    device = images_BHWC.device
    column_BHW, row_BHW = _sources(matrix_B6, H, W)
    column_BHW, row_BHW = column_BHW.add_((W - 1) / 2).round_(), row_BHW.add_((H - 1) / 2).round_()
    inside_BHW = (column_BHW >= 0) & (column_BHW < W) & (row_BHW >= 0) & (row_BHW < H)
    row_BHW, column_BHW = row_BHW.clamp_(0, H - 1).int(), column_BHW.clamp_(0, W - 1).int()
    first_B11 = torch.arange(B, device=device, dtype=torch.int32)[:, None, None] * (H * W)
    pixel_BHW = row_BHW.mul_(W).add_(column_BHW).add_(first_B11)
    pixel_BHW = torch.where(inside_BHW, pixel_BHW, B * H * W)
    black_13 = images_BHWC.new_zeros(1, 3)
    pixels_P3 = torch.cat((images_BHWC.reshape(-1, 3), black_13))
    return pixels_P3.index_select(0, pixel_BHW.view(-1)).view(B, H, W, 3)


def _interpolate(
    images_BHWC: Tensor, op_B: Tensor, matrix_B6: Tensor, fill: tuple[int, ...]
) -> Tensor:
    """The same, bilinear and with the levels ``fill`` outside."""
    H, W = images_BHWC.shape[1:3]
    column_BHW, row_BHW = _sources(matrix_B6, H, W)
    x_BHW, y_BHW = column_BHW.mul_(2 / W), row_BHW.mul_(2 / H)  # -1 to 1 from edge to edge
    inside_BHW = (x_BHW >= -1) & (x_BHW < 1) & (y_BHW >= -1) & (y_BHW < 1)
    grid_BHW2 = torch.stack((x_BHW, y_BHW), 3)
    source_B3HW = images_BHWC.movedim(3, 1).float()
    level_B3HW = F.grid_sample(source_B3HW, grid_BHW2, padding_mode="border", align_corners=False)
    # Pillow cuts the fraction; 1/64 is more than a place's rounding error may take from a whole level.
    planes = level_B3HW.add_(1 / 64).to(torch.uint8).unbind(1)
    filled = [torch.where(inside_BHW, *pair) for pair in zip(planes, fill, strict=True)]
    moved_B = (op_B >= NUMBER[GEOMETRIC[0]]) & (op_B <= NUMBER[GEOMETRIC[-1]])
    return torch.where(moved_B[:, None, None, None], torch.stack(filled, 3), images_BHWC)


def _sources(matrix_B6: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Each pixel's column and row in the source, from the centre: float32 ``[B, H, W]`` each."""
    device = matrix_B6.device
    x_1W = torch.arange(W, device=device, dtype=torch.float32).sub_((W - 1) / 2)[None]
    y_H1 = torch.arange(H, device=device, dtype=torch.float32).sub_((H - 1) / 2)[:, None]
    xx, xy, x0, yx, yy, y0 = matrix_B6[:, :, None, None].unbind(1)
    return xx * x_1W + xy * y_H1 + x0, yx * x_1W + yy * y_H1 + y0


def _turn_over(images_BHWC: Tensor, op_B: Tensor) -> Tensor:
    """The images upside down whose operation it is."""
    B, H, W, _ = images_BHWC.shape
    row_1H = torch.arange(H, device=images_BHWC.device)[None]
    first_B1 = torch.arange(B, device=images_BHWC.device)[:, None] * H
    flip_B1 = (op_B == NUMBER["vertical_flip"])[:, None]
    source_BH = torch.where(flip_B1, H - 1 - row_1H, row_1H) + first_B1
    return images_BHWC.reshape(B * H, W * 3).index_select(0, source_BH.view(-1)).view(B, H, W, 3)


def _blend(
    images_BHWC: Tensor,
    op_B: Tensor,
    own_B: Tensor,
    other_B: Tensor,
    names: frozenset[str],
    *,
    pillow: bool,
) -> Tensor:
    """``own`` times the image plus ``other`` times another image; the factors 1 and 0 change nothing."""
    x_BHWC = images_BHWC.float()
    # That of each operation, or 0 for the images of other ones. Brightness blends with black.
    others = []
    if not names.isdisjoint(("color", "contrast")):
        r, g, b = _planes(images_BHWC)
        luma_BHW = (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
        luma_BHW = luma_BHW.round_() if pillow else luma_BHW.floor_()
        if "color" in names:
            others.append(luma_BHW[..., None] * _is(op_B, "color"))
        if "contrast" in names:
            others.append(luma_BHW.mean((1, 2))[:, None, None, None] * _is(op_B, "contrast"))
    if "sharpness" in names:
        # As x + other * (blurred - x): a plain area then keeps its exact level.
        others.append(_blurred(images_BHWC).sub_(x_BHWC).mul_(_is(op_B, "sharpness")))
    blended_BHWC = x_BHWC.mul_(own_B[:, None, None, None])
    for other_BHWC in others:
        blended_BHWC.addcmul_(other_BHWC, other_B[:, None, None, None])
    return blended_BHWC.clamp_(0, 255).to(torch.uint8)


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
    if "solarize_add" in names:
        added = torch.where(level_1L1 < 128, (level_1L1 + value).int().clamp_(max=255), level_1L1)
        table_BLC = torch.where(op == NUMBER["solarize_add"], added, table_BLC)
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
    planes_CBHW = _planes(images_BHWC).div_(255)
    high_BHW, low_BHW = planes_CBHW.amax(0), planes_CBHW.amin(0)
    r, g, b = planes_CBHW
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
        level_BHW = (high_BHW - span_BHW * fall).clamp_(0, 1).mul_(255.999)
        channels.append(level_BHW.to(torch.uint8))
    shifted_BHWC = torch.stack(channels, 3)
    return torch.where((op_B == NUMBER["hue"])[:, None, None, None], shifted_BHWC, images_BHWC)


def _fill_boxes(images_BHWC: Tensor, columns_BL: Tensor) -> Tensor:
    """The image with a box of one colour; top, left, bottom, right, and the colour's levels."""
    H, W = images_BHWC.shape[1:3]
    device = images_BHWC.device
    top, left, bottom, right = columns_BL[:, :4, None, None].unbind(1)
    row_H1 = torch.arange(H, device=device)[:, None]
    column_W = torch.arange(W, device=device)
    inside_BHW = (row_H1 >= top) & (row_H1 < bottom) & (column_W >= left) & (column_W < right)
    colour_B11C = columns_BL[:, None, None, 4:].to(torch.uint8)
    return torch.where(inside_BHW[..., None], colour_B11C, images_BHWC)


def _fill_each_box(images_BHWC: Tensor, columns_BL: Tensor) -> Tensor:
    """The same, box by box."""
    done_BHWC = images_BHWC.clone()
    colour_B3 = columns_BL[:, 4:].to(torch.uint8)
    for b, (top, left, bottom, right) in enumerate(columns_BL[:, :4].int().tolist()):
        done_BHWC[b, top:bottom, left:right] = colour_B3[b]
    return done_BHWC


def _planes(images_BHWC: Tensor) -> Tensor:
    """The channels as floats, each in one piece of memory: ``[3, B, H, W]``."""
    return images_BHWC.movedim(3, 0).contiguous().float()


def _is(op_B: Tensor, name: str) -> Tensor:
    """1 where an image's operation is ``name``, else 0: ``[B, 1, 1, 1]``."""
    return (op_B == NUMBER[name]).float()[:, None, None, None]
