"""3x3 max pooling with padding 1 on a GPU: channels-last maps, stride s of 1 or 2.

    y[b, h, w]  = max over i, j in 0..2 of x[b, h s + i - 1, w s + j - 1],  tap[b, h, w] = 3 i + j
    dx[b, h, w] = sum over the windows that contain it of dy where the tap is (h, w)

One launch each way. As in PyTorch the first of equal values has the tap, a NaN beats every number, and
the last NaN of a window has it. The tap is one byte; PyTorch's index has eight, and its backward reads x
besides, adds atomically, and needs zeros to add to. Here each gradient is gathered in fp32 in the order
of the windows and written once, so results are reproducible bit by bit.

A program goes down ROWS rows of outputs, with their s rows of inputs each, over a tile of columns and
channels, ``w`` and ``c``. Accesses run along the channels. Forward reduces each input row to the maxima
over its three taps and keeps those that the next output row shares: with s = 2 a program reads 2 ROWS + 1
rows for 2 ROWS. Backward computes the s x s inputs of an output's place from the windows around it; with
s = 2 these are the output's own window, those right and below, and that of the diagonal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import compiler_options, on_device, warp_size
from torch import Tensor

ROWS = 4
TILE = 1024  # elements of an output row
_CHANNELS = 64  # of a tile, at most, if the map is wide enough
_EACH = 8  # elements of a thread


@triton.jit
def _place(OH, OW, C: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """This program's image, its first output row, its columns and its channels."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (C + BC - 1) // BC
    columns, stretches = tl.cdiv(OW, BW), tl.cdiv(OH, ROWS)
    c = program % blocks * BC + tl.arange(0, BC)
    w = program // blocks % columns * BW + tl.arange(0, BW)
    stretch = program // (blocks * columns)
    return (stretch // stretches).to(tl.int64), stretch % stretches * ROWS, w[:, None], c[None, :]


@triton.jit
def _greater(best, tap, x, tap_of_x):
    """The greater value, the first of equal ones, and its tap; a NaN is the greatest."""
    more = (x > best) | (x != x)
    return tl.where(more, x, best), tl.where(more, tap_of_x, tap)


@triton.jit
def _maxima(x_ptr, image, h, w, c, H, W, C: tl.constexpr, STRIDE: tl.constexpr):
    """Of input row ``h``, for each output column the maximum of three taps, and which it is."""
    row_ptr = x_ptr + (image * H + h) * W * C
    listed = (h >= 0) & (h < H) & (c < C)
    left = w * STRIDE - 1
    at = left * C + c
    # The first tap inside the map: it has the maximum where all are -inf.
    tap = tl.where(left < 0, 1, 0) + tl.zeros_like(c)
    inside = listed & (left >= 0) & (left < W)
    best = tl.load(row_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    for j in tl.static_range(1, 3):
        inside = listed & (left + j < W)
        x = tl.load(row_ptr + at + j * C, mask=inside, other=float("-inf")).to(tl.float32)
        best, tap = _greater(best, tap, x, j)
    return best, tap


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def pool_kernel(
    x_ptr, y_ptr, tap_ptr, H, W, OH, OW,
    C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y and the taps of ROWS rows."""
    image, first, w, c = _place(OH, OW, C, ROWS, BW, BC)
    top, top_tap = _maxima(x_ptr, image, first * STRIDE - 1, w, c, H, W, C, STRIDE)
    # Above the map all is -inf: the first tap inside is one row below.
    top_tap += tl.where(first == 0, 3, 0)
    if STRIDE == 1:
        middle, middle_tap = _maxima(x_ptr, image, first, w, c, H, W, C, STRIDE)
    for k in range(ROWS):
        oh = first + k
        if STRIDE == 2:
            middle, middle_tap = _maxima(x_ptr, image, 2 * oh, w, c, H, W, C, STRIDE)
        bottom, bottom_tap = _maxima(x_ptr, image, oh * STRIDE + 1, w, c, H, W, C, STRIDE)
        best, tap = _greater(top, top_tap, middle, 3 + middle_tap)
        best, tap = _greater(best, tap, bottom, 6 + bottom_tap)
        at = (image * OH + oh) * OW * C + w * C + c
        listed = (oh < OH) & (w < OW) & (c < C)
        tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=listed)
        tl.store(tap_ptr + at, tap.to(tl.uint8), mask=listed)
        if STRIDE == 1:
            top, top_tap, middle, middle_tap = middle, middle_tap, bottom, bottom_tap
        else:
            top, top_tap = bottom, bottom_tap


@triton.jit
def _came(dy_ptr, tap_ptr, image, oh, ow, c, OH, OW, tap: tl.constexpr, C: tl.constexpr):
    """The gradients of the outputs at ``oh``, ``ow`` whose maximum is at ``tap``, elsewhere 0."""
    start = (image * OH + oh) * OW * C
    listed = (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & (c < C)
    at = ow * C + c
    dy = tl.load(dy_ptr + start + at, mask=listed, other=0.0).to(tl.float32)
    return tl.where(tl.load(tap_ptr + start + at, mask=listed, other=9) == tap, dy, 0.0)


@triton.jit
def _gradient(
    dy_ptr, tap_ptr, image, oh, ow, c, OH, OW,
    down: tl.constexpr, right: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """dx of the inputs ``down`` rows and ``right`` columns from those at ``oh * STRIDE``, ``ow * STRIDE``."""
    dx = tl.zeros([ow.shape[0], c.shape[1]], tl.float32)
    # Taps from the last to the first: windows from the first to the last, as PyTorch on a CPU.
    for i in tl.static_range(2, -1, -1):
        for j in tl.static_range(2, -1, -1):
            if (down + 1 - i) % STRIDE == 0 and (right + 1 - j) % STRIDE == 0:
                dx += _came(
                    dy_ptr, tap_ptr, image, oh + (down + 1 - i) // STRIDE,
                    ow + (right + 1 - j) // STRIDE, c, OH, OW, 3 * i + j, C,
                )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def gradient_kernel(
    dy_ptr, tap_ptr, dx_ptr, H, W, OH, OW,
    C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of ROWS * STRIDE rows, each element once."""
    image, first, ow, c = _place(OH, OW, C, ROWS, BW, BC)
    for k in range(ROWS):
        oh = first + k
        # All gradients of a place, then their stores: the loads that they share are made once.
        gradients = ()
        for place in tl.static_range(STRIDE * STRIDE):
            gradients += (
                _gradient(
                    dy_ptr, tap_ptr, image, oh, ow, c, OH, OW,
                    place // STRIDE, place % STRIDE, C, STRIDE,
                ),
            )  # fmt: skip
        for place in tl.static_range(STRIDE * STRIDE):
            h = oh * STRIDE + place // STRIDE
            w = ow * STRIDE + place % STRIDE
            row_ptr = dx_ptr + (image * H + h) * W * C
            dx = gradients[place].to(dx_ptr.dtype.element_ty)
            tl.store(row_ptr + w * C + c, dx, mask=(h < H) & (w < W) & (c < C))


def _launch(
    kernel: triton.runtime.JITFunction, tensors: tuple[Tensor, ...], x: Tensor, y: Tensor, s: int
) -> None:
    """Launches a kernel over output ``y`` of input ``x``."""
    B, C, OH, OW = y.shape
    BC = min(_power_of_2(C), _CHANNELS)
    BW = min(_power_of_2(OW), TILE // BC)
    BC = min(_power_of_2(C), TILE // BW)
    warp = warp_size()
    options = compiler_options(max(BW * BC // (_EACH * warp), 1), warp)
    grid = B * -(-OH // ROWS) * -(-OW // BW) * -(-C // BC)
    kernel[(grid,)](*tensors, *x.shape[2:], OH, OW, C, s, ROWS, BW, BC, **options)


def _empty(shape: tuple[int, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@on_device
def max_pool(x_BCHW: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """y and the taps in uint8, both channels-last as x: one launch."""
    B, C, H, W = x_BCHW.shape
    shape = (B, C, (H - 1) // stride + 1, (W - 1) // stride + 1)
    y_BCHW = _empty(shape, x_BCHW, x_BCHW.dtype)
    taps_BCHW = _empty(shape, x_BCHW, torch.uint8)
    _launch(pool_kernel, (x_BCHW, y_BCHW, taps_BCHW), x_BCHW, y_BCHW, stride)
    return y_BCHW, taps_BCHW


@on_device
def max_pool_backward(
    dy_BCHW: Tensor, taps_BCHW: Tensor, stride: int, height: int, width: int
) -> Tensor:
    """The gradient of x ``[B, C, height, width]``, channels-last: one launch."""
    dy_BCHW = dy_BCHW.contiguous(memory_format=torch.channels_last)
    dx_BCHW = _empty((*dy_BCHW.shape[:2], height, width), dy_BCHW, dy_BCHW.dtype)
    _launch(gradient_kernel, (dy_BCHW, taps_BCHW, dx_BCHW), dx_BCHW, dy_BCHW, stride)
    return dx_BCHW
