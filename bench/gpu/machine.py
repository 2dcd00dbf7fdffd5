"""The card's limits (copies, matrix products, launches) and the versions of its software."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.child import Result

COPY_BYTES, SIDE, LAUNCHES = 1 << 30, 8192, 1000


def the_device(result: Result) -> torch.device:
    """The GPU, or the CPU in a dry run; its name is recorded in the section.

    Raises:
        RuntimeError: torch finds no GPU.
    """
    if not result.dry and not torch.cuda.is_available():
        raise RuntimeError("this is no dry run, and torch finds no GPU")
    device = torch.device("cpu" if result.dry else "cuda")
    result.data["device"] = "cpu" if result.dry else torch.cuda.get_device_name()
    result.data["torch"] = torch.__version__
    return device


def call_ms(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds from the start of each call to the start of the next: by events on a GPU, read after
    the last call; else by the clock."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def measure(result: Result) -> None:
    """The section."""
    device = the_device(result)
    _versions(result)
    rounds = 3 if result.dry else 20
    _copy(result, 1 << 12 if result.dry else COPY_BYTES // 2, rounds, device)
    side = 64 if result.dry else SIDE
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), rounds, device)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        result.figure(f"{side}^3 {name} TFLOP/s", 2 * side**3 / seconds / 1e12)
    _launches(result, torch.zeros(8, device=device))


def _copy(result: Result, numel: int, rounds: int, device: torch.device) -> None:
    """Bytes read and written a second."""
    source = torch.randn(numel, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), rounds, device)
    result.figure("copy TB/s", 2 * source.nbytes / seconds / 1e12)


def _seconds(call: Callable[[], object], rounds: int, device: torch.device) -> float:
    call_ms(call, max(1, rounds // 4), device)
    return statistics.median(call_ms(call, rounds, device)) / 1e3


def _launches(result: Result, x: Tensor) -> None:
    """The host's time for an eager operator, and the device's time for a node of a graph."""
    count = 10 if result.dry else LAUNCHES

    def calls() -> None:
        for _ in range(count):
            x.add_(1)

    def waited() -> None:
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    calls()
    waited()  # else the queue is full and the host waits for the device
    started = time.perf_counter()
    calls()
    result.figure("host us an eager add", 1e6 * (time.perf_counter() - started) / count)
    if x.device.type != "cuda":
        return
    waited()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    result.figure("device us a graph's node", 1e6 * _seconds(graph.replay, 20, x.device) / count)


def _versions(result: Result) -> None:
    result.data["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "torchvision", "numpy", "safetensors"):
        try:
            result.data["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203 (five names)
            result.data["versions"][name] = None
    if result.dry:
        return
    properties = torch.cuda.get_device_properties(0)
    result.data["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    result.data["gpu"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }
    result.write()
