"""FFSD's map losses on a GPU: each map read once forward and once backward, channels last or first.

Forward, one program a sample: it reads the map in tiles ``[BP pixels, BC channels]`` and keeps only
A_p = mean_c x_pc^2, in registers, as ``[BP, NB]``: column j holds the j-th block of pixels. So a tile has
whole rows of channels, and a map whose pixels are no power of two idles few lanes (``_blocks``). Norm, threshold, target and squared difference follow there, and
the loss's gradient by A, so that one number a pixel is saved. With
u = A / n, n = max(||A||, eps), and g the loss's gradient by u,

    dL/dA = (g - u (u . g)) / n     (no second term where ||A|| < eps)
    dL/dx_pc = 2 / C x_pc dL/dA_p

and the backward is that last line times the incoming gradient. The k-th smallest of u is selected
without a sort: u is not negative, so its bit patterns are ordered as its values are; for a small map
the entries below each entry are counted, for a large one the threshold is found bit by bit, counting
the entries below a candidate. There are no atomics, and programs are independent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import compiler_options, on_device, warp_size
from fastokd.kernels.layout import strides
from torch import Tensor

_TILE = 16384  # elements in flight of a map that is one tile
_BLOCK = 8192  # of one that is several
_BACKWARD_TILE = 4096
_EPS = tl.constexpr(1e-12)


@triton.jit
def _tile(x_ptr, stride_p, stride_c, p, c, HW: tl.constexpr, C: tl.constexpr):
    inside = (p < HW)[:, None] & (c < C)[None, :]
    at = p[:, None] * stride_p + c[None, :] * stride_c
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(out_ptr, stride_p, stride_c, p, c, HW: tl.constexpr, C: tl.constexpr, value_PC):
    inside = (p < HW)[:, None] & (c < C)[None, :]
    tl.store(out_ptr + p[:, None] * stride_p + c[None, :] * stride_c, value_PC, mask=inside)


@triton.jit
def _pixels(BP: tl.constexpr, NB: tl.constexpr):
    """The numbers of all pixels: ``[BP, NB]``, as all that end in _PN; ``[BP]`` where NB is 1."""
    p = tl.arange(0, BP)
    return p if NB == 1 else tl.arange(0, NB)[None, :] * BP + p[:, None]


@triton.jit
def _squares(
    x_ptr, stride_p, stride_c, p, HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """The sum over the channels of pixels ``p``."""
    a_P = tl.zeros([BP], tl.float32)
    for start in range(0, C, BC):
        x_PC = _tile(x_ptr, stride_p, stride_c, p, start + tl.arange(0, BC), HW, C)
        a_P += tl.sum(x_PC * x_PC, axis=1)
    return a_P


@triton.jit
def _energy(
    x_ptr, stride_p, stride_c,
    HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A of one sample, 0 past its last pixel."""
    p = tl.arange(0, BP)
    if NB == 1:
        a_PN = _squares(x_ptr, stride_p, stride_c, p, HW, C, BP, BC)
    else:
        a_PN = tl.zeros([BP, NB], tl.float32)
        # Two stages: a block is loaded while the one before it is summed.
        for j in tl.range(0, tl.cdiv(HW, BP), num_stages=2):
            a_P = _squares(x_ptr, stride_p, stride_c, j * BP + p, HW, C, BP, BC)
            a_PN = tl.where(tl.arange(0, NB)[None, :] == j, a_P[:, None], a_PN)
    return a_PN / C


@triton.jit
def _block(s_PN, j, NB: tl.constexpr):
    """Those of block ``j``, ``[BP]``."""
    is_j_1N = tl.arange(0, NB)[None, :] == j
    return s_PN if NB == 1 else tl.sum(tl.where(is_j_1N, s_PN, 0.0), axis=1)


@triton.jit
def _sum(x_PN, NB: tl.constexpr):
    x_N = tl.sum(x_PN, axis=0)
    return x_N if NB == 1 else tl.sum(x_N, axis=0)


@triton.jit
def _norm(a_PN, NB: tl.constexpr):
    """||A|| and the divisor max(||A||, eps); a NaN goes through both."""
    r = tl.sqrt_rn(_sum(a_PN * a_PN, NB))
    return r, tl.where(r < _EPS, _EPS, r)


@triton.jit
def _target(u_PN, r, HW: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr):
    """(r/2 - u) sign(u - threshold) + r/2, the threshold the (HW // 3)-th smallest of u."""
    # Past the last pixel: above every value. If one u is NaN, all are.
    pattern_PN = tl.where(_pixels(BP, NB) < HW, u_PN.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    if BP * NB <= 64:  # the largest of those that fewer than HW // 3 are below
        pattern_P = tl.reshape(pattern_PN, [BP * NB])
        below_P = tl.sum((pattern_P[None, :] < pattern_P[:, None]).to(tl.int32), axis=1)
        found = tl.max(tl.where(below_P < HW // 3, pattern_P, 0), axis=0)
    else:
        found = 0
        for step in range(30):  # u is at most 1 and a rounding: bits 30 and 31 are never set
            candidate = found | (1 << (29 - step))
            below = _sum((pattern_PN < candidate).to(tl.int32), NB)
            found = tl.where(below < HW // 3, candidate, found)
    sign_PN = (pattern_PN > found).to(tl.float32) - (pattern_PN < found).to(tl.float32)
    return (r / 2 - u_PN) * sign_PN + r / 2


@triton.jit
def _gradient(u_PN, g_PN, r, n, C: tl.constexpr, NB: tl.constexpr):
    """2 / C dL/dA from g, the gradient by u."""
    along = tl.where(r < _EPS, 0.0, _sum(u_PN * g_PN, NB))
    return tl.div_rn(g_PN - u_PN * along, n) * (2.0 / C)


@triton.jit
def map_kernel(
    x_ptr, u_ptr, r_ptr, x_stride_b, x_stride_p, x_stride_c,
    HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    a_PN = _energy(x_ptr + b * x_stride_b, x_stride_p, x_stride_c, HW, C, BP, NB, BC)
    r, n = _norm(a_PN, NB)
    p = _pixels(BP, NB)
    tl.store(u_ptr + b * HW + p, tl.div_rn(a_PN, n), mask=p < HW)
    tl.store(r_ptr + b, r)


@triton.jit
def map_backward_kernel(
    x_ptr, u_ptr, r_ptr, g_ptr, out_ptr, x_stride_b, x_stride_p, x_stride_c,
    out_stride_b, out_stride_p, out_stride_c,
    HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    x_ptr += b * x_stride_b
    out_ptr += b * out_stride_b
    at = b * HW + _pixels(BP, NB)
    listed = _pixels(BP, NB) < HW
    u_PN = tl.load(u_ptr + at, mask=listed, other=0.0)
    g_PN = tl.load(g_ptr + at, mask=listed, other=0.0)
    r = tl.load(r_ptr + b)
    s_PN = _gradient(u_PN, g_PN, r, tl.where(r < _EPS, _EPS, r), C, NB)
    for j in range(tl.cdiv(HW, BP)):
        p = j * BP + tl.arange(0, BP)
        s_P = _block(s_PN, j, NB)
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            x_PC = _tile(x_ptr, x_stride_p, x_stride_c, p, c, HW, C)
            _put(out_ptr, out_stride_p, out_stride_c, p, c, HW, C, x_PC * s_P[:, None])


@triton.jit
def pair_kernel(
    x_ptr, y_ptr, loss_ptr, sx_ptr, sy_ptr, scale,
    x_stride_b, x_stride_p, x_stride_c, y_stride_b, y_stride_p, y_stride_c,
    HW: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr,
    BCX: tl.constexpr, BCY: tl.constexpr,
    SHIFT: tl.constexpr, NEED_X: tl.constexpr, NEED_Y: tl.constexpr,
):  # fmt: skip
    """A sample's squared difference times ``scale``, and 2 / C dL/dA of each map that asks.

    SHIFT compares with the other map's target instead of its attention, which has no gradient.
    """
    b = tl.program_id(0).to(tl.int64)
    p = _pixels(BP, NB)
    a_PN = _energy(x_ptr + b * x_stride_b, x_stride_p, x_stride_c, HW, CX, BP, NB, BCX)
    rx, nx = _norm(a_PN, NB)
    u_PN = tl.div_rn(a_PN, nx)
    a_PN = _energy(y_ptr + b * y_stride_b, y_stride_p, y_stride_c, HW, CY, BP, NB, BCY)
    ry, ny = _norm(a_PN, NB)
    v_PN = tl.div_rn(a_PN, ny)
    other_PN = tl.where(p < HW, _target(v_PN, ry, HW, BP, NB), 0.0) if SHIFT else v_PN
    d_PN = u_PN - other_PN
    tl.store(loss_ptr + b, _sum(d_PN * d_PN, NB) * scale)
    g_PN = d_PN * (2.0 * scale)
    if NEED_X:
        tl.store(sx_ptr + b * HW + p, _gradient(u_PN, g_PN, rx, nx, CX, NB), mask=p < HW)
    if NEED_Y:
        tl.store(sy_ptr + b * HW + p, _gradient(v_PN, -g_PN, ry, ny, CY, NB), mask=p < HW)


@triton.jit
def pair_backward_kernel(
    x_ptr, s_ptr, incoming_ptr, out_ptr, x_stride_b, x_stride_p, x_stride_c,
    out_stride_b, out_stride_p, out_stride_c,
    HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The map times its pixel's number and the incoming gradient."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    x_PC = _tile(x_ptr + b * x_stride_b, x_stride_p, x_stride_c, p, c, HW, C)
    s_P = tl.load(s_ptr + b * HW + p, mask=p < HW, other=0.0) * tl.load(incoming_ptr)
    out_ptr += b * out_stride_b
    _put(out_ptr, out_stride_p, out_stride_c, p, c, HW, C, x_PC * s_P[:, None])


@triton.jit
def shift_kernel(
    y_ptr, out_ptr, y_stride_b, y_stride_p, y_stride_c,
    out_stride_b, out_stride_p, out_stride_c,
    HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A map and its shift; a map that is more than one tile is read again, from the cache."""
    b = tl.program_id(0).to(tl.int64)
    y_ptr += b * y_stride_b
    out_ptr += b * out_stride_b
    p = tl.arange(0, BP)
    if NB == 1 and BC >= C:
        y_PC = _tile(y_ptr, y_stride_p, y_stride_c, p, tl.arange(0, BC), HW, C)
        shift_P = _shift(tl.sum(y_PC * y_PC, axis=1) / C, HW, C, BP, NB)
        c = tl.arange(0, BC)
        _put(out_ptr, out_stride_p, out_stride_c, p, c, HW, C, y_PC + shift_P[:, None])
    else:
        a_PN = _energy(y_ptr, y_stride_p, y_stride_c, HW, C, BP, NB, BC)
        shift_PN = _shift(a_PN, HW, C, BP, NB)
        for j in range(tl.cdiv(HW, BP)):
            at = j * BP + p
            shift_P = _block(shift_PN, j, NB)
            for start in range(0, C, BC):
                c = start + tl.arange(0, BC)
                y_PC = _tile(y_ptr, y_stride_p, y_stride_c, at, c, HW, C)
                _put(out_ptr, out_stride_p, out_stride_c, at, c, HW, C, y_PC + shift_P[:, None])


@triton.jit
def _shift(a_PN, HW: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, NB: tl.constexpr):
    """What is added to every channel."""
    r, n = _norm(a_PN, NB)
    u_PN = tl.div_rn(a_PN, n)
    return (_target(u_PN, r, HW, BP, NB) - u_PN) * r / C


def _blocks(pixels: int, channels: int, most: int = _TILE) -> tuple[int, int, int]:
    """BP, NB and BC: one tile of at most ``most`` elements, else several of _BLOCK or ``most``.

    Larger ones would spill registers, smaller ones have too few bytes in flight.
    """
    tile = min(most, _BLOCK)
    BC = min(triton.next_power_of_2(channels), tile // 8)
    BP = triton.next_power_of_2(pixels)
    if most < BP * BC:
        BP = tile // BC
    return BP, triton.next_power_of_2(-(-pixels // BP)), BC


def _options(BP: int, NB: int, BC: int) -> dict[str, int]:
    """At most 32 elements a thread, or 16 warps; with several blocks all registers."""
    warps = min(max(BP * BC // 1024, 1), 16)
    return compiler_options(warps, warp_size()) if NB > 1 else {"num_warps": warps}


@on_device
def attention_map(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """n(A(x)) ``[B, HW]`` and ||A(x)|| ``[B]``: one launch."""
    B, C, H, W = x_BCHW.shape
    u_BP = x_BCHW.new_empty((B, H * W), dtype=torch.float32)
    r_B = x_BCHW.new_empty(B, dtype=torch.float32)
    BP, NB, BC = _blocks(H * W, C)
    if B:
        map_kernel[(B,)](
            x_BCHW, u_BP, r_B, *strides(x_BCHW), H * W, C, BP, NB, BC, **_options(BP, NB, BC)
        )  # fmt: skip
    return u_BP, r_B


@on_device
def attention_map_backward(x_BCHW: Tensor, u_BP: Tensor, r_B: Tensor, grad_BP: Tensor) -> Tensor:
    """The gradient by x of :func:`attention_map`'s first result: one launch."""
    B, C, H, W = x_BCHW.shape
    out_BCHW = torch.empty_like(x_BCHW)
    BP, NB, BC = _blocks(H * W, C)
    if B:
        map_backward_kernel[(B,)](
            x_BCHW, u_BP, r_B, grad_BP.contiguous(), out_BCHW,
            *strides(x_BCHW), *strides(out_BCHW), H * W, C, BP, NB, BC, **_options(BP, NB, BC),
        )  # fmt: skip
    return out_BCHW


@on_device
def attention_pair(
    x_BCHW: Tensor, y_BCHW: Tensor, shift: bool, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and 2 / C dL/dA ``[B, HW]`` of each map that asks (else ``[0]``): one launch, and
    the sum over the batch."""
    B, CX, H, W = x_BCHW.shape
    CY = y_BCHW.shape[1]
    new = x_BCHW.new_empty
    loss_B = new(B, dtype=torch.float32)
    sx = new((B, H * W) if need_x else 0, dtype=torch.float32)
    sy = new((B, H * W) if need_y else 0, dtype=torch.float32)
    BP, NB, BC = _blocks(H * W, max(CX, CY))
    BCX, BCY = (min(triton.next_power_of_2(C), BC) for C in (CX, CY))
    if B:
        pair_kernel[(B,)](
            x_BCHW, y_BCHW, loss_B, sx, sy, 1.0 / (B * H * W), *strides(x_BCHW), *strides(y_BCHW),
            H * W, CX, CY, BP, NB, BCX, BCY, shift, need_x, need_y,
            **_options(BP, NB, BC),
        )  # fmt: skip
    return loss_B.sum(), sx, sy


@on_device
def attention_pair_backward(x_BCHW: Tensor, s_BP: Tensor, incoming: Tensor) -> Tensor:
    """x * s * incoming, in x's layout and dtype: one launch."""
    B, C, H, W = x_BCHW.shape
    out_BCHW = torch.empty_like(x_BCHW)
    BP, _, BC = _blocks(H * W, C, _BACKWARD_TILE)
    if B:
        grid = (B, triton.cdiv(H * W, BP), triton.cdiv(C, BC))
        pair_backward_kernel[grid](
            x_BCHW, s_BP, incoming, out_BCHW, *strides(x_BCHW), *strides(out_BCHW),
            H * W, C, BP, BC, num_warps=4,
        )  # fmt: skip
    return out_BCHW


@on_device
def shifted_map(y_BCHW: Tensor) -> Tensor:
    """y + (target(y) - u) ||A|| / C, in y's layout and dtype: one launch."""
    B, C, H, W = y_BCHW.shape
    out_BCHW = torch.empty_like(y_BCHW)
    BP, NB, BC = _blocks(H * W, C)
    if B:
        shift_kernel[(B,)](
            y_BCHW, out_BCHW, *strides(y_BCHW), *strides(out_BCHW), H * W, C, BP, NB, BC,
            **_options(BP, NB, BC),
        )  # fmt: skip
    return out_BCHW
