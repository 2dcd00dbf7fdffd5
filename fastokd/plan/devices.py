"""What a machine can do: GPUs by their data sheets, this CPU by micro-benchmarks."""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastokd.device import pick_precision
from fastokd.errors import unknown_name
from fastokd.plan.ops import Op, Product

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Device(Protocol):
    """Where a step would run."""

    @property
    def name(self) -> str: ...

    @property
    def how(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def precision(self) -> str: ...

    def seconds(self, op: Op) -> float:
        """The least that the operator takes, its launches not counted."""
        ...


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense FLOP/s by dtype, bytes/s of its memory and, one way, of its link.

    ``host_seconds``: what an eager operator costs the CPU that launches it. ``kernel_seconds``: the
    shortest time from the start of one kernel to the start of the next, in a replayed graph too.
    """

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    memory_bytes: int
    link: float
    host_seconds: float = 7.5e-6
    kernel_seconds: float = 2e-6
    how: str = "modelled: data sheet"
    precision: str = "bf16"

    def seconds(self, op: Op) -> float:
        """The roofline: arithmetic or memory, whichever is slower, at the peak of each."""
        rate = self.flops[torch.bfloat16 if op.dtype == torch.bfloat16 else torch.float32]
        return max(op.flops / rate, op.bytes / self.bandwidth, self.kernel_seconds * op.launches)


def _gpu(name: str, bf16: float, fp32: float, bandwidth: float, memory: float, link: float) -> Gpu:
    rates = {torch.bfloat16: bf16 * 1e12, torch.float32: fp32 * 1e12}
    return Gpu(name, rates, bandwidth * 1e12, int(memory * 1e9), link * 1e9)


# NVIDIA's data sheets: dense TFLOP/s (fp32 without tensor cores), TB/s, GB, GB/s of NVLink or PCIe
# in one direction.
GPUS = {
    "h100": _gpu("H100 SXM 80 GB", 989.4, 66.9, 3.35, 80, 450),
    "h200": _gpu("H200 SXM 141 GB", 989.4, 66.9, 4.8, 141, 450),
    "a100": _gpu("A100 SXM 80 GB", 312, 19.5, 2.039, 80, 300),
    "rtx4090": _gpu("GeForce RTX 4090", 165.2, 82.6, 1.008, 24, 32),
}
NAMES = [*GPUS, "cpu"]


def find_device(name: str) -> Device:
    """A device by name; ``cpu`` is this one, measured now.

    Raises:
        UserError: an unknown name.
    """
    if name == "cpu":
        return Cpu.calibrated(pick_precision("auto", torch.device("cpu")))
    if name not in GPUS:
        raise unknown_name("device", name, NAMES)
    return GPUS[name]


def best_seconds(run: Callable[[], object], repeats: int = 5, least: float = 2e-3) -> float:
    """Seconds of one call, in the fastest of several bursts of at least ``least`` seconds."""
    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    calls = max(1, int(least / max(once, 1e-7)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


# What a matrix product is cut to along its longest side: far less than a third-level cache, and enough
# rows for the small operand, which `mm` packs at each call, to weigh as little as in a layer.
CACHED_BYTES = 1 << 22
# Working sets of the copies: from the nearest cache to far beyond the last.
SIZES = tuple(1 << power for power in range(14, 29, 2))


@dataclass
class Cpu:
    """This CPU, by four micro-benchmarks: products, copies in cache and in memory, one tiny op.

    Nothing is fitted to a training step.
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
        """Measures copies and the cost of an operator; products as they are asked for."""
        dtypes = {torch.float32, DTYPES[precision]}
        rates = {dtype: [_copy_rate(size, dtype) for size in sizes] for dtype in dtypes}
        a = torch.ones(8, requires_grad=True)
        overhead = best_seconds(lambda: a * a)
        return Cpu(precision, overhead, list(sizes), rates, _memory())

    def seconds(self, op: Op) -> float:
        """Products at the rate of the same product in cache, bytes at the rate of a copy of as many."""
        dtype = op.dtype if op.dtype in self.copy_rates else torch.float32
        arithmetic = sum(self.product_seconds(product, dtype) for product in op.products)
        return max(arithmetic, op.bytes / self.copy_rate(op.bytes, dtype)) + self.overhead

    def copy_rate(self, size: int, dtype: torch.dtype) -> float:
        """Bytes/s over a working set of ``size``: in proportion between those measured."""
        rates = self.copy_rates[dtype]
        at = bisect.bisect_left(self.sizes, size)
        if at == 0:
            return rates[0]
        if at == len(self.sizes):
            return rates[-1]
        low, high = self.sizes[at - 1], self.sizes[at]
        share = (size - low) / (high - low)
        return rates[at - 1] * (1 - share) + rates[at] * share

    def product_seconds(self, product: Product, dtype: torch.dtype) -> float:
        """Of a product whose operands lie in cache; a depthwise one has no arithmetic to speak of."""
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
    """The product's sides, the longest one cut so that its operands fit the cache."""
    m, n, k = product.m, product.n, product.k
    while size * (m * k + k * n + m * n) > CACHED_BYTES and max(m, k) > 64:
        if m >= k:
            m //= 2
        else:
            k //= 2
    return m, n, k


def _copy_rate(size: int, dtype: torch.dtype) -> float:
    """Bytes/s of an operator that reads one half of ``size`` and writes the other, which is there: a
    run keeps the memory that it frees, and optimizers work in place."""
    a: Tensor = torch.ones(size // 2 // torch.tensor([], dtype=dtype).element_size(), dtype=dtype)
    out = torch.zeros_like(a)
    return size / best_seconds(lambda: torch.neg(a, out=out))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
