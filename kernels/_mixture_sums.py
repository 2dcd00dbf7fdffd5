"""Sums over classes for the mixture-distillation kernel, block by block.

Tuples hold one tile (a block of a row) or one scalar for each student or source; every loop over
them is unrolled. Exponentials are taken to the base 2, which is one instruction.
"""

import triton
import triton.language as tl
from fastokd.kernels._tiles import PAD, maxima, sums

LOG2E = tl.constexpr(1.4426950408889634)
# The weight of a source at -inf, which contributes nothing, even where it is NaN. No weight and no
# weight's logarithm is above 1.
UNHEARD = tl.constexpr(2.0)
# Kept for each student: of its row z the max, sum of exp, the same at T, labels . z; of its mixture M
# the max, sum of exp at T, sum of exp(M / T) (M - z) / T, sum of exp, labels . M; and the labels'
# mass. (z and M are relative to their maxima; what isn't needed is 0.)
STATS = tl.constexpr(10)


@triton.jit
def labels_tile(labels, b, cols, C: tl.constexpr, SOFT: tl.constexpr):
    """The smoothed label distribution over the block's classes; NaN where an id that counts is no class.

    ``labels`` is a pointer, its stride over samples and the smoothing; then a pointer to second ids,
    one to their shares and one to the samples' weights, each dense or None.
    """
    smoothing = labels[2]
    if SOFT:
        y = tl.load(labels[0] + b * labels[1] + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = (1.0 - smoothing) * y + smoothing / C
    elif labels[3] is not None:
        label, label2 = tl.load(labels[0] + b * labels[1]), tl.load(labels[3] + b)
        share2 = tl.load(labels[4] + b).to(tl.float32)
        keep = (1.0 - smoothing) * (1.0 - share2)
        keep2 = (1.0 - smoothing) * share2
        is_class = ((label >= 0) & (label < C)) | (share2 == 1.0)
        is_class = is_class & (((label2 >= 0) & (label2 < C)) | (share2 == 0.0))
        y = tl.where(is_class, smoothing / C, float("nan"))
        y = tl.where(cols == label, keep, 0.0) + tl.where(cols == label2, keep2, 0.0) + y
    else:
        label = tl.load(labels[0] + b * labels[1])
        base = tl.where((label >= 0) & (label < C), smoothing / C, float("nan"))
        y = tl.where(cols == label, 1.0 - smoothing, 0.0) + base
    if labels[5] is not None:
        y *= tl.load(labels[5] + b).to(tl.float32)
    return tl.where(cols < C, y, 0.0)


@triton.jit
def mixing_weights(scores, MIX: tl.constexpr):
    """Softmax over a score tile's rows, or its logarithm for probs; UNHEARD at -inf.

    All weights of a row of -inf alone are UNHEARD.
    """
    heard = scores != float("-inf")
    top = tl.max(scores, 1)[:, None]
    d = tl.where(heard, scores - tl.where(top == float("-inf"), 0.0, top), 0.0)
    e = tl.where(heard, tl.exp(d), 0.0)
    total = tl.sum(e, 1)[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    if MIX == "probs":
        return tl.where(heard, d - tl.log(total), UNHEARD)
    else:
        return tl.where(heard, e / total, UNHEARD)


@triton.jit
def entries(flat, s, N: tl.constexpr, TILE: tl.constexpr):
    """Student s's N numbers in a flattened score tile, each in a register of its own."""
    column = tl.arange(0, TILE * TILE) - s * TILE
    parts = ()
    for n in tl.static_range(N):
        parts += (tl.where(column == n, flat, 0.0),)
    return sums(parts)


@triton.jit
def entries_of_two(one, two, s, N: tl.constexpr, TILE: tl.constexpr):
    """``entries`` of two score tiles, one mask serving both."""
    column = tl.arange(0, TILE * TILE) - s * TILE
    parts = ()
    for n in tl.static_range(N):
        parts += (tl.where(column == n, one, 0.0), tl.where(column == n, two, 0.0))
    found = sums(parts)
    first, second = (), ()
    for n in tl.static_range(N):
        first += (found[2 * n],)
        second += (found[2 * n + 1],)
    return first, second


@triton.jit
def with_entries(flat, s, values, TILE: tl.constexpr):
    """A flattened score tile with numbers added to student s's row."""
    # Counted down, so that the compiler doesn't reuse entries()'s masks and keep them in registers.
    column = s * TILE - tl.arange(0, TILE * TILE)
    for n in tl.static_range(len(values)):
        flat += tl.where(column == -n, values[n], 0.0)
    return flat


@triton.jit
def pick(tiles, s, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The tile of a student known at run time, one of COUNT from FIRST on; of no tiles, None."""
    out = None
    if len(tiles) > 0:
        out = tiles[FIRST]
    for n in tl.static_range(FIRST + 1, min(FIRST + COUNT, len(tiles))):
        out = tl.where(s == n, tiles[n], out)
    return out


@triton.jit
def share(weight, MIX: tl.constexpr):
    """A mixing weight: probs keeps their logarithms, which don't underflow."""
    if MIX == "probs":
        return tl.exp2(weight * LOG2E)
    else:
        return weight


@triton.jit
def has_target(mix):
    """Whether a student has any source: whether any weight, NaN too, isn't UNHEARD."""
    # By a sum, since there are few mask registers.
    away = 0.0
    for n in tl.static_range(len(mix)):
        away += mix[n] - UNHEARD
    return away != 0.0


@triton.jit
def mixed_row(rows, mix, MIX: tl.constexpr):
    """The mixture of logits that is one student's target.

    The gradients recompute it and subtract the maximum found with the sums. Explicit FMAs make both
    round alike; otherwise a saturated softmax is off by a rounding of its largest logit.
    """
    mixed = tl.zeros_like(rows[0])
    for n in tl.static_range(len(rows)):
        more = tl.fma(share(mix[n], MIX), rows[n], mixed)
        mixed = tl.where(mix[n] != UNHEARD, more, mixed)
    return mixed


@triton.jit
def block_stats(z, rows, mix, y, inv_T, MIX: tl.constexpr, MIXTURE_CE: tl.constexpr):
    """One student's STATS over this block's classes."""
    k, nothing = inv_T * LOG2E, 0.0 * inv_T
    if MIX == "logits" or MIXTURE_CE:
        mixed = mixed_row(rows, mix, MIX)
        top, top_mixed = maxima((z, mixed))
        u = mixed - top_mixed
    else:
        top, top_mixed = tl.max(z, 0), nothing
    d = z - top
    terms = (y, tl.exp2(d * LOG2E), tl.exp2(d * k), y * d)
    if MIX == "logits":
        e = tl.exp2(u * k)
        terms += (e, e * (u - d))
    if MIXTURE_CE:
        terms += (tl.exp2(u * LOG2E), y * u)
    total = sums(terms)
    stats = (top, total[1], total[2], total[3], top_mixed)
    if MIX == "logits":
        stats += (total[4], total[5] * inv_T)
    else:
        stats += (nothing, nothing)
    if MIXTURE_CE:
        stats += total[len(total) - 2 : len(total)]
    else:
        stats += (nothing, nothing)
    stats += (total[0],)
    return stats


@triton.jit
def no_stats(TILE: tl.constexpr):
    """Stats of no class at all, as vectors over students."""
    zero = tl.zeros([TILE], tl.float32)
    low = zero + PAD
    return (low, zero, zero, zero, low, zero, zero, zero, zero, zero)


@triton.jit
def with_student(vectors, s, values, TILE: tl.constexpr):
    """The vectors with student s's entries set."""
    out = ()
    for i in tl.static_range(len(vectors)):
        out += (tl.where(tl.arange(0, TILE) == s, values[i], vectors[i]),)
    return out


@triton.jit
def of_student(vectors, s, TILE: tl.constexpr):
    """Student s's entries, each in a register of its own."""
    parts = ()
    for i in tl.static_range(len(vectors)):
        parts += (tl.where(tl.arange(0, TILE) == s, vectors[i], 0.0),)
    return sums(parts)


@triton.jit
def _rebased(stats, top, top_mixed, inv_T):
    """Sums as they are under other maxima."""
    d, u = stats[0] - top, stats[4] - top_mixed
    eu = tl.exp(u * inv_T)
    return (
        top,
        stats[1] * tl.exp(d),
        stats[2] * tl.exp(d * inv_T),
        stats[3] + stats[9] * d,
        top_mixed,
        stats[5] * eu,
        (stats[6] + stats[5] * ((u - d) * inv_T)) * eu,
        stats[7] * tl.exp(u),
        stats[8] + stats[9] * u,
        stats[9],
    )


@triton.jit
def merge_stats(one, two, inv_T):
    """The stats of two sets of classes together."""
    top, top_mixed = tl.maximum(one[0], two[0]), tl.maximum(one[4], two[4])
    a, b = _rebased(one, top, top_mixed, inv_T), _rebased(two, top, top_mixed, inv_T)
    out = ()
    for i in tl.static_range(STATS):
        if i == 0 or i == 4:
            out += (a[i],)
        else:
            out += (a[i] + b[i],)
    return out


@triton.jit
def block_log_sums(rows, inv_T):
    """Each source's max, and its sum of exp at T."""
    tops = maxima(rows)
    terms = ()
    for n in tl.static_range(len(rows)):
        terms += (tl.exp2((rows[n] - tops[n]) * (inv_T * LOG2E)),)
    return tops, sums(terms)


@triton.jit
def no_log_sums(TILE: tl.constexpr):
    """Log sums of no class at all, as vectors over sources."""
    zero = tl.zeros([TILE], tl.float32)
    return zero + PAD, zero


@triton.jit
def merge_log_sums(one, tops, totals, inv_T, TILE: tl.constexpr):
    """Vectors of log sums with those of another block's sources added."""
    source = tl.arange(0, TILE)
    block_top, block_total = no_log_sums(TILE)
    for n in tl.static_range(len(tops)):
        block_top = tl.where(source == n, tops[n], block_top)
        block_total = tl.where(source == n, totals[n], block_total)
    top = tl.maximum(one[0], block_top)
    total = one[1] * tl.exp((one[0] - top) * inv_T)
    return top, total + block_total * tl.exp((block_top - top) * inv_T)


@triton.jit
def unpacked(vector, N: tl.constexpr, TILE: tl.constexpr):
    """A vector's first N entries, each in a register of its own."""
    parts = ()
    for n in tl.static_range(N):
        parts += (tl.where(tl.arange(0, TILE) == n, vector, 0.0),)
    return sums(parts)
