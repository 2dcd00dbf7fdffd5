"""FFSD's losses on stage maps: where a network looks, and where another should.

For a map x of C channels and HW pixels:

    A(x)  = mean_c x_c^2, flattened                              [B, HW]
    n(v)  = v / max(||v||_2, 1e-12), per sample
    attention_transfer(x, y)  = mse(n(A(x)), n(A(y)))
    feature_transfer(x, y)    = mse(n(x), n(y)), all channels and pixels of a sample one vector
    target(y) = (r/2 - a) sign(a - threshold) + r/2              a = n(A(y)), r = ||A(y)||_2,
                threshold = the largest of the floor(HW / 3) smallest entries of a, sign(0) = 0
    attention_diversity(x, y) = mse(n(A(x)), target(y))          gradient in x alone
    shifted_map(y)            = y + (target(y) - a) r / C        no gradient

``target`` mixes the raw norm with normalised values, as the published code does. The five live in
one file because they are these three definitions and nothing else; `mse` is the mean over all
elements. Arithmetic is fp32 for fp32, bf16 and fp16 maps and float64 where a map is float64;
gradients come back in each map's own dtype. An empty batch gives a loss of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops._dispatch import choose

EPS = 1e-12


def attention_map(maps_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """n(A(x)): the channel mean of squares, L2-normalised per sample.

    Args:
        maps_BCHW: floating point, H * W at least 3.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        ``[B, H * W]`` in fp32 (float64 for float64); a map of zeros gives zeros.

    Raises:
        UserError: a shape or dtype that doesn't fit, an ``impl`` that can't serve the call.
    """
    _check("maps_BCHW", maps_BCHW)
    choose("attention_map", impl, maps_BCHW.device, {})
    return _normalised(_energy(maps_BCHW, _dtype(maps_BCHW)))


def attention_transfer(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(A(student)), n(A(other))), a scalar in fp32 (float64 for float64).

    Differentiable in both maps; a caller detaches what it only compares with. The maps may have
    different channels and dtypes, not different pixels. Raises as :func:`attention_map` does.
    """
    _check("student_BCHW", student_BCHW)
    _check_pair(student_BCHW, other_BCHW, channels=False)
    choose("attention_transfer", impl, student_BCHW.device, {})
    dtype = _dtype(student_BCHW, other_BCHW)
    return _mse(_normalised(_energy(student_BCHW, dtype)), _normalised(_energy(other_BCHW, dtype)))


def feature_transfer(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(student), n(other)) over whole maps, a scalar in fp32 (float64 for float64).

    Differentiable in both maps, which have one shape; any H and W of at least 1. Raises UserError
    for a shape or dtype that doesn't fit and for an ``impl`` that can't serve the call.
    """
    _check("student_BCHW", student_BCHW, pixels=1)
    _check_pair(student_BCHW, other_BCHW, channels=True)
    choose("feature_transfer", impl, student_BCHW.device, {})
    dtype = _dtype(student_BCHW, other_BCHW)
    return _mse(
        _normalised(student_BCHW.to(dtype).flatten(1)), _normalised(other_BCHW.to(dtype).flatten(1))
    )


def attention_diversity(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(A(student)), target(other)), a scalar in fp32 (float64 for float64).

    The gradient goes to the student's map alone. Shapes, dtypes and errors as for
    :func:`attention_transfer`.
    """
    _check("student_BCHW", student_BCHW)
    _check_pair(student_BCHW, other_BCHW, channels=False)
    choose("attention_diversity", impl, student_BCHW.device, {})
    dtype = _dtype(student_BCHW, other_BCHW)
    a_BP = _normalised(_energy(student_BCHW, dtype))
    with torch.no_grad():
        _, target_BP, _ = _target(other_BCHW, dtype)
    return _mse(a_BP, target_BP)


@torch.no_grad()
def shifted_map(other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """other + (target(other) - n(A(other))) ||A(other)|| / C, the same for every channel.

    Returns a map of the input's shape and dtype, without gradient. Raises as
    :func:`attention_map` does.
    """
    _check("other_BCHW", other_BCHW)
    choose("shifted_map", impl, other_BCHW.device, {})
    dtype = _dtype(other_BCHW)
    a_BP, target_BP, r_B1 = _target(other_BCHW, dtype)
    B, C, H, W = other_BCHW.shape
    shift_B1HW = ((target_BP - a_BP) * r_B1 / C).view(B, 1, H, W)
    return (other_BCHW.to(dtype) + shift_B1HW).to(other_BCHW.dtype)


def _check(name: str, maps_BCHW: Tensor, pixels: int = 3) -> None:
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


def _check_pair(student_BCHW: Tensor, other_BCHW: Tensor, *, channels: bool) -> None:
    """Raises where the second map doesn't fit the first."""
    B, C, H, W = student_BCHW.shape
    wanted = [B, C if channels else "channels", H, W]
    shape = list(other_BCHW.shape)
    fits = len(shape) == 4 and shape[1] and shape == [B, C if channels else shape[1], H, W]
    if not fits or not other_BCHW.is_floating_point():
        raise UserError(
            f"other_BCHW is {other_BCHW.dtype} of shape {shape}: "
            f"it must be floating point, [{', '.join(map(str, wanted))}], as the student's map"
        )
    if other_BCHW.device != student_BCHW.device:
        raise UserError(
            f"other_BCHW is on {other_BCHW.device} and student_BCHW on {student_BCHW.device}: "
            "move one to the other's device"
        )


def _dtype(*maps: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in maps) else torch.float32


def _energy(maps_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """A(x), ``[B, HW]``."""
    return maps_BCHW.to(dtype).square().mean(1).flatten(1)


def _normalised(v_BN: Tensor) -> Tensor:
    return F.normalize(v_BN, dim=1, eps=EPS)


def _mse(a_BN: Tensor, b_BN: Tensor) -> Tensor:
    return (a_BN - b_BN).square().sum() / max(a_BN.numel(), 1)


def _target(other_BCHW: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a = n(A(y)), target(y) and r, ``[B, HW]`` twice and ``[B, 1]``."""
    energy_BP = _energy(other_BCHW, dtype)
    r_B1 = torch.linalg.vector_norm(energy_BP, dim=1, keepdim=True)
    a_BP = energy_BP / r_B1.clamp_min(EPS)
    threshold_B1 = a_BP.kthvalue(a_BP.shape[1] // 3, dim=1, keepdim=True).values
    half_B1 = r_B1 / 2
    return a_BP, (half_B1 - a_BP) * torch.sign(a_BP - threshold_B1) + half_B1, r_B1
