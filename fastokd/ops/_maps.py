"""What the ops on stage maps share: checks, the layouts that the fast paths read, fake results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.kernels.layout import even_pixels

EPS = 1e-12
MAX_PIXELS = 4096  # kernels/attention.py holds a sample's attention in one program's registers


def check_map(name: str, maps_BCHW: Tensor, pixels: int) -> None:
    """Raises where one map doesn't fit; reads no values."""
    if maps_BCHW.dim() != 4 or not maps_BCHW.is_floating_point() or not maps_BCHW.shape[1]:
        raise UserError(
            f"{name} is {maps_BCHW.dtype} of shape {list(maps_BCHW.shape)}: "
            "it must be floating point, [batch, channels, height, width]"
        )
    if maps_BCHW.shape[2] * maps_BCHW.shape[3] < pixels:
        raise UserError(
            f"{name} has {maps_BCHW.shape[2]} x {maps_BCHW.shape[3]} pixels: its attention needs "
            f"at least {pixels}; use larger images or an earlier stage's map"
        )


def check_pair(student_BCHW: Tensor, other_BCHW: Tensor, *, channels: bool) -> None:
    """Raises where the second map doesn't fit the first, in its channels too if ``channels``."""
    B, C, H, W = student_BCHW.shape
    shape = other_BCHW.shape
    fits = len(shape) == 4 and shape[1] > 0 and (shape[0], *shape[2:]) == (B, H, W)
    if not fits or (channels and shape[1] != C) or not other_BCHW.is_floating_point():
        raise UserError(
            f"other_BCHW is {other_BCHW.dtype} of shape {list(shape)}: it must be floating point, "
            f"[{B}, {C if channels else 'channels'}, {H}, {W}], as the student's map"
        )
    if other_BCHW.device != student_BCHW.device:
        raise UserError(
            f"other_BCHW is on {other_BCHW.device} and student_BCHW on {student_BCHW.device}: "
            "move one to the other's device"
        )


def arithmetic(*maps: Tensor) -> torch.dtype:
    """float64 where a map is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in maps) else torch.float32


def normalised(v_BN: Tensor) -> Tensor:
    """n(v) per sample."""
    return F.normalize(v_BN, dim=1, eps=EPS)


def mse(a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """The mean over all elements; 0 for none."""
    return (a_BN - b_BN).square().sum() / max(a_BN.numel(), 1)


def attention_refusals(*maps: Tensor) -> dict[str, str | None]:
    """Why the C++ and the Triton form can't read these maps' attention."""
    cpp = triton = None
    for x_BCHW in maps:
        _, C, H, W = x_BCHW.shape
        if x_BCHW.dtype == torch.float64:
            cpp = triton = "float64 is for impl='torch'"
        elif not even_pixels(x_BCHW):
            cpp = triton = "a map's pixels are not evenly spaced in memory"
        elif C > 1 and x_BCHW.stride(1) != 1 and x_BCHW.stride(3 if W > 1 else 2) != 1:
            cpp = "a map is neither channels-last nor channels-first in memory"
        if H * W > MAX_PIXELS:
            triton = f"a map has {H * W} pixels, more than the {MAX_PIXELS} that fit one program"
    return {"cpp": cpp, "triton": triton}


def fp32(x: Tensor, *shape: int) -> Tensor:
    """An empty tensor in fp32, on ``x``'s device."""
    return x.new_empty(shape, dtype=torch.float32)


def like(x: Tensor, asked: bool = True) -> Tensor:
    """An empty tensor as ``x``; ``[0]`` where not asked."""
    return torch.empty_like(x) if asked else x.new_empty(0)
