"""FFSD's transfer of whole maps: mse(n(x), n(y)).

A sample's channels and pixels are one vector, n(v) = v / max(||v||_2, 1e-12), `mse` the mean over
all elements of the batch. Arithmetic is fp32 for fp32, bf16 and fp16 maps and float64 where a map
is float64; gradients come back in each map's own dtype. An empty batch gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.kernels._maps import dense, in_rows
from fastokd.ops._dispatch import choose
from fastokd.ops._map_ops import FeaturePair
from fastokd.ops._maps import arithmetic, check_map, check_pair, mse, normalised


def feature_transfer(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(student), n(other)) over whole maps, a scalar in fp32 (float64 for float64).

    Differentiable once in both maps, which have one shape.

    Args:
        student_BCHW, other_BCHW: floating point; their dtypes may differ.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Raises:
        UserError: a shape or dtype that doesn't fit, an ``impl`` that can't serve the call.
    """
    check_map("student_BCHW", student_BCHW, pixels=1)
    check_pair(student_BCHW, other_BCHW, channels=True)
    device = student_BCHW.device
    refusals = {} if impl == "torch" else _refusals(student_BCHW, other_BCHW)
    chosen = choose("feature_transfer", impl, device, refusals)
    if chosen != "torch":
        interpreted = chosen == "triton" and device.type != "cuda"
        return FeaturePair.apply(interpreted, student_BCHW, other_BCHW)
    dtype = arithmetic(student_BCHW, other_BCHW)
    return mse(
        normalised(student_BCHW.to(dtype).flatten(1)), normalised(other_BCHW.to(dtype).flatten(1))
    )


def _refusals(student_BCHW: Tensor, other_BCHW: Tensor) -> dict[str, str | None]:
    """Why the C++ and the Triton form can't read these maps."""
    cpp = triton = None
    if torch.float64 in (student_BCHW.dtype, other_BCHW.dtype):
        cpp = triton = "float64 is for impl='torch'"
    elif student_BCHW.dtype != other_BCHW.dtype:
        cpp = triton = "the maps have different dtypes"
    elif not dense(student_BCHW, other_BCHW):
        cpp = "the maps' samples are not dense in one order"
        if not (in_rows(student_BCHW) and in_rows(other_BCHW)):
            triton = "the maps' samples are neither dense in one order nor both channels-last"
    return {"cpp": cpp, "triton": triton}
