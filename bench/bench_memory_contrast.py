"""MCL's contrasts with a memory in C++ against torch's, which gathers the memory's rows.

    python -m bench.bench_memory_contrast [--rounds N] [--threads N] [--cpu-time] [--json FILE]

Two students, 64 samples with 1,024 rows each of a memory of 50,000 x 128 in fp32: the similarities alone, and
the whole contrasts, forward and backward. Both run in turn, after a check that they agree. `bound` is the
time to read the rows twice, at the speed of a copy in the same run. Each form's largest memory beyond
its inputs is measured in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.benchmark.peak import PeakMemory
from fastokd.learner.allocator import keep_freed_memory
from fastokd.ops import cpp
from fastokd.ops.memory_contrast import memory_contrast, similarities

S, B, K, D, N = 2, 64, 1024, 128, 50_000
WEIGHTS = (0.1, 1.0, 0.1, 1.0)
IMPLS = {"eager": "torch", "cpp": "cpp"}


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x_SBD = F.normalize(torch.randn(S, B, D), dim=-1).requires_grad_()
    return x_SBD, F.normalize(torch.randn(S, N, D), dim=-1), torch.randint(N, (B, K))


def alone(impl: str, given: tuple[Tensor, Tensor, Tensor], incoming: Tensor) -> Tensor:
    A_SSBK = similarities(*given, 0.07, impl=impl)
    return torch.autograd.grad(A_SSBK, given[0], incoming)[0]


def whole(impl: str, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    terms = memory_contrast(*given, impl=impl)
    total = torch.stack([w * term for w, term in zip(WEIGHTS, terms, strict=True)]).sum()
    return torch.autograd.grad(total, given[0])[0]


def peak_bytes(impl: str) -> int:
    """Of the whole contrasts: how far this process's largest resident memory grows."""
    assert cpp.ensure_built() is None
    x_SBD, memory_SND, index_BK = drawn()
    whole(impl, (x_SBD[:, :1].detach().requires_grad_(), memory_SND, index_BK[:1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    memory = PeakMemory(torch.device("cpu"))
    whole(impl, (x_SBD, memory_SND, index_BK))
    return memory.read()


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_bytes, (impl,)) / 1e6 for name, impl in IMPLS.items()}
    print(", ".join(f"{name}: {peak:.0f} MB at its largest" for name, peak in peaks.items()))
    keep_freed_memory()  # as a run does
    given, incoming = drawn(), torch.randn(S, S, B, K)
    calls = {
        "similarities": {n: lambda i=i: alone(i, given, incoming) for n, i in IMPLS.items()},
        "contrasts": {n: lambda i=i: whole(i, given) for n, i in IMPLS.items()},
    }
    rows = []
    for what, pair in calls.items():
        torch.testing.assert_close(pair["cpp"](), pair["eager"](), rtol=1e-3, atol=1e-4)
        rows.append(summary(what, in_turn(pair, rounds, clock)))
    source = torch.randn(S * B * K * D)
    target = torch.empty_like(source)
    copies = in_turn({"copy": lambda: target.copy_(source)}, rounds, clock)["copy"]
    for row in rows:
        row["bound_ms"] = statistics.median(copies)  # reads and writes as many bytes
    rows[-1] |= {f"{name}_peak_mb": peak for name, peak in peaks.items()}
    return rows


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
