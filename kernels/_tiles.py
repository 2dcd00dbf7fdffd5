"""What the kernels share: joint reductions, and rows read and written at their full width."""

import triton
import triton.language as tl

# Fills the columns past a row's end. Finite, so that 0 * PAD is 0, yet exp(PAD - max) is 0.
PAD = tl.constexpr(-1e30)


@triton.jit
def _reduced(tiles, MAX: tl.constexpr):
    if len(tiles) == 0:
        return ()
    elif len(tiles) == 1:
        if MAX:
            return (tl.max(tiles[0], 0),)
        else:
            return (tl.sum(tiles[0], 0),)
    elif len(tiles) > 8:  # more would need too many registers at once
        return _reduced(tiles[0:8], MAX) + _reduced(tiles[8:], MAX)
    else:
        pairs = ()
        for i in tl.static_range(len(tiles) // 2):
            pairs += (tl.join(tiles[2 * i], tiles[2 * i + 1]),)
        if len(tiles) % 2 == 1:
            pairs += (tl.join(tiles[len(tiles) - 1], tiles[len(tiles) - 1]),)
        joint = _reduced(pairs, MAX)
        parts = ()
        for i in tl.static_range(len(tiles) // 2):
            left, right = tl.split(joint[i])
            parts += (left, right)
        if len(tiles) % 2 == 1:
            last, _ = tl.split(joint[len(tiles) // 2])
            parts += (last,)
        return parts


@triton.jit
def sums(tiles):
    """The sum of each tile over its first dimension, in one exchange between the warps for all."""
    return _reduced(tiles, False)


@triton.jit
def maxima(tiles):
    """The maximum of each tile, NaN ignored, as ``sums``."""
    return _reduced(tiles, True)


@triton.jit
def load_rows(of, b, c0, cols, ROWS: tl.constexpr, C: tl.constexpr, VEC: tl.constexpr):
    """``ROWS`` rows of sample ``b`` in fp32 from column ``c0`` on, PAD past column C.

    ``of`` is a pointer and the strides of a row and of a sample. They count VEC elements each, so
    that the compiler knows every row's alignment without specialising on a number that may depend
    on the batch.
    """
    width: tl.constexpr = (C + VEC - 1) // VEC * VEC
    out = ()
    # Addresses are computed row by row, so that a sweep's loop keeps none of them in registers.
    row = of[0] + c0 + b * of[2] * VEC
    for _ in tl.static_range(ROWS):
        x = tl.load(row + cols, mask=c0 + cols < width, other=0.0).to(tl.float32)
        out += (tl.where(c0 + cols < C, x, PAD),)
        row += of[1].to(tl.int64) * VEC
    return out


@triton.jit
def store_rows(ptr, pitch, b, c0, cols, tiles, C: tl.constexpr, VEC: tl.constexpr):
    """The counterpart of ``load_rows`` for rows as ``empty_gradient`` lays them out.

    The padding of a padded row is overwritten.
    """
    width: tl.constexpr = (C + VEC - 1) // VEC * VEC
    row = ptr + c0 + b * pitch * VEC
    for i in tl.static_range(len(tiles)):
        tl.store(row + cols, tiles[i].to(ptr.dtype.element_ty), mask=c0 + cols < width)
        row += tl.num_programs(0).to(tl.int64) * pitch * VEC
