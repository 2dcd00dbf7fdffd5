"""One step under torch's profiler: kernels, launches, the device's busy share, the longest kernels."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.child import Result
from bench.gpu.machine import the_device
from bench.gpu.steps import large_recipe, small_recipe
from bench.gpu.timing import Program, free
from fastokd.learner.learner import WARM_UP_ALONE

LONGEST, NAME = 30, 110
LEAST_SECONDS = 7.0
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMem")
# Prefixes of torch's own ranges; a kernel's name may have a # as well, in a lambda.
NAMED = ("ProfilerStep", "Optimizer.", "## ")


def measure(result: Result) -> None:
    """The section: each step eager, then replayed as a graph."""
    device = the_device(result)
    cohorts = {
        "network ResNet-32": small_recipe("network", result.dry),
        "network ResNet-34": large_recipe("network", "resnet34", result.dry),
    }
    for capture in (False, True):
        for name, of in cohorts.items():
            row = result.row(name=f"{name} {'captured' if capture else 'eager'}")
            if capture and result.dry:
                row["needs"] = "a GPU"
                continue
            if result.left() < LEAST_SECONDS:
                row["needs"] = "more time than the section had left"
                continue
            try:
                row |= _profiled(Program(name, of, capture=capture), result, device)
                result.figure(f"{row['name']} kernels", row["kernels"])
                result.figure(f"{row['name']} busy", row["busy"])
            except Exception as error:
                result.fail(row, error)
            free()


def _profiled(program: Program, result: Result, device: torch.device) -> dict[str, Any]:
    loop = program.build(result)
    for _ in range(WARM_UP_ALONE + 3 if program.capture else 2):
        loop.step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return _table(found.events(), DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU)


def _table(events: Any, where: DeviceType) -> dict[str, Any]:
    """Times in microseconds. Annotated ranges aren't kernels."""
    launches: Counter[str] = Counter()
    kernels: dict[str, list[float]] = defaultdict(list)
    begins, ends = [], []
    for event in events:
        if event.device_type == DeviceType.CPU and event.name.startswith(LAUNCHES):
            launches[event.name] += 1
        named = getattr(event, "is_user_annotation", False) or event.name.startswith(NAMED)
        if event.device_type == where and not named:
            kernels[event.name].append(event.time_range.elapsed_us())
            begins.append(event.time_range.start)
            ends.append(event.time_range.end)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: is CUPTI there, and free?")
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    total, span = sum(map(sum, kernels.values())), max(ends) - min(begins)
    return {
        "kernels": sum(map(len, kernels.values())),
        "device_us": total,
        "span_us": span,
        "busy": total / span,
        "launches": dict(launches),
        "longest": [
            [name[:NAME], len(times), round(sum(times), 1)] for name, times in longest[:LONGEST]
        ],
    }
