"""The speed of devices: GPUs by measurements or data sheets, this CPU by micro-benchmarks."""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fastokd.device import pick_precision
from fastokd.errors import unknown_name
from fastokd.plan.ops import Op, Product

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# How far GPU kernels stay behind the roofline, by kind of operator: microseconds beside a kernel's
# arithmetic and traffic, and the share of the roofline that those reach. Fitted to the profiles of two
# captured steps on an H200 (network ResNet-32 and ResNet-34, docs/gpu); docs/plan.md has the error
# for steps that weren't fitted. The norms and poolings measured are PyTorch's; our pooling, by name, is
# assumed to be as the norms. Other kinds have OTHERS. A float32 product, which has no tensor cores,
# reaches its rate.
BEHIND = {
    **dict.fromkeys(("norm", "fused", "max_pool", "max_pool_backward"), (3.0, 0.42)),
    **{"product": (10.2, 0.7), "pool": (1.6, 0.16)},
}
OTHERS = (1.6, 1.0)


@dataclass(frozen=True)
class Gpu:
    """A GPU: dense FLOP/s by dtype, bytes/s of its memory and (one direction) link.

    ``how``: where the figures come from. ``host_seconds``: the CPU's time for an operator of an
    eager step, its part of the backward included. ``node_seconds``: the time of the smallest kernel
    in a replayed graph. Both were measured beside an H200.
    """

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    memory_bytes: int
    link: float
    how: str
    host_seconds: float = 38e-6
    node_seconds: float = 0.93e-6
    precision: str = "bf16"

    def bound(self, op: Op) -> float:
        """The roofline: the slower of arithmetic and memory traffic, each at its peak."""
        return max(self._roofline(op), self.node_seconds * op.launches)

    def seconds(self, op: Op, beside: int = 1) -> float:
        """The expected time. ``beside``: kernels that run at a time; they hide each other's latency."""
        latency, share = BEHIND.get(op.name) or BEHIND.get(op.kind, OTHERS)
        if op.products and op.dtype == torch.float32:
            share = 1.0
        return 1e-6 * latency * op.launches / beside + self._roofline(op) / share

    def _roofline(self, op: Op) -> float:
        rate = self.flops[torch.bfloat16 if op.dtype == torch.bfloat16 else torch.float32]
        return max(op.flops / rate, op.bytes / self.bandwidth)


SHEET = "data sheet"


def _gpu(
    name: str, bf16: float, fp32: float, bandwidth: float, memory: float, link: float, how: str
) -> Gpu:
    rates = {torch.bfloat16: bf16 * 1e12, torch.float32: fp32 * 1e12}
    return Gpu(
        name,
        rates,
        bandwidth * 1e12,
        int(memory * 1e9),
        link * 1e9,
        f"modelled: {how}; kernels as on an H200",
    )


# Dense TFLOP/s (fp32 without tensor cores), TB/s, GB, GB/s of NVLink or PCIe in one direction. Memory
# and links are the data sheets'. The measured ones: an 8192^3 product and a device copy.
GPUS = {
    "h100": _gpu(
        "H100 SXM 80 GB",
        *(798, 66.9, 3.0, 80, 450),
        "bf16 and memory measured elsewhere on an H100 80GB HBM3, fp32 by its data sheet",
    ),
    "h200": _gpu("H200 SXM 141 GB", 786, 51.3, 4.25, 141, 450, "measured on an H200 (docs/gpu)"),
    "a100": _gpu("A100 SXM 80 GB", 312, 19.5, 2.039, 80, 300, SHEET),
    "rtx4090": _gpu("GeForce RTX 4090", 165.2, 82.6, 1.008, 24, 32, SHEET),
}
NAMES = [*GPUS, "cpu"]


def find_device(name: str) -> Device:
    """A device by name; ``cpu`` is this CPU, measured now.

    Raises:
        UserError: an unknown name.
    """
    if name == "cpu":
        return Cpu.calibrated(pick_precision("auto", torch.device("cpu")))
    if name not in GPUS:
        raise unknown_name("device", name, NAMES)
    return GPUS[name]


def best_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, in the fastest of five bursts of at least two milliseconds."""
    timer = timeit.Timer(run)
    timer.timeit(1)
    calls = max(1, int(2e-3 / max(timer.timeit(1), 1e-7)))
    return min(timer.repeat(5, calls)) / calls


# A measured matrix product is cut to this size along its longest side: it fits the third-level cache,
# and has enough rows to make the packing of the small operand in `mm` negligible, as in a layer.
CACHED_BYTES = 1 << 22
# Working sets of the copies, in bytes: from the first-level cache to main memory.
SIZES = tuple(1 << power for power in range(14, 29, 2))


@dataclass
class Cpu:
    """This CPU, by four micro-benchmarks: products, copies in cache and in memory, one tiny op.

    No value is fitted to a training step.
    """

    precision: str
    overhead: float
    sizes: list[int]
    copy_rates: dict[torch.dtype, list[float]]
    memory_bytes: int
    name: str = "this CPU"
    how: str = "modelled: micro-benchmarks of this machine"
    products: dict[tuple[Product, torch.dtype], float] = field(default_factory=dict)

    @staticmethod
    def calibrated(precision: str, sizes: Sequence[int] = SIZES) -> Cpu:
        """Measures copies and the overhead of an operator; products are measured on demand."""
        dtypes = {torch.float32, DTYPES[precision]}
        rates = {dtype: [_copy_rate(size, dtype) for size in sizes] for dtype in dtypes}
        a = torch.ones(8, requires_grad=True)
        overhead = best_seconds(lambda: a * a)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Cpu(precision, overhead, list(sizes), rates, memory)

    def seconds(self, op: Op, beside: int = 1) -> float:
        """Products at the rate of the same product in cache, bytes at the rate of a copy of that size."""
        dtype = op.dtype if op.dtype in self.copy_rates else torch.float32
        arithmetic = sum(self.product_seconds(product, dtype) for product in op.products)
        return max(arithmetic, op.bytes / self.copy_rate(op.bytes, dtype)) + self.overhead

    def copy_rate(self, size: int, dtype: torch.dtype) -> float:
        """Bytes/s over a working set of ``size``: interpolated between the measured sizes."""
        return float(np.interp(size, self.sizes, self.copy_rates[dtype]))

    def product_seconds(self, product: Product, dtype: torch.dtype) -> float:
        """Seconds of a product with its operands in cache; 0 for a depthwise convolution."""
        if product.n == 1 and product.count > 1:
            return 0.0
        m, n, k = _cut(product, torch.tensor([], dtype=dtype).element_size())
        key = (Product(m, n, k), dtype)
        if key not in self.products:
            a, b = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
            out = torch.empty(m, n, dtype=dtype)
            self.products[key] = 2 * m * n * k / best_seconds(lambda: torch.mm(a, b, out=out))
        return product.flops / self.products[key]


def _cut(product: Product, size: int) -> tuple[int, int, int]:
    """The product's sides, the longest halved until the operands fit :data:`CACHED_BYTES`."""
    m, n, k = product.m, product.n, product.k
    while size * (m * k + k * n + m * n) > CACHED_BYTES and max(m, k) > 64:
        if m >= k:
            m //= 2
        else:
            k //= 2
    return m, n, k


def _copy_rate(size: int, dtype: torch.dtype) -> float:
    """Bytes/s of an operator that reads one half of ``size`` and writes the other half. The output is
    allocated before: a run reuses freed memory, and optimizers work in place."""
    a = torch.ones(size // 2 // torch.tensor([], dtype=dtype).element_size(), dtype=dtype)
    out = torch.zeros_like(a)
    return size / best_seconds(lambda: torch.neg(a, out=out))


Device = Gpu | Cpu
