"""The time of a forward pass of a student: eager, compiled, by ONNX Runtime."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastokd.device import cpu_name, set_matmul_precision, synchronize
from fastokd.errors import in_one_line

BATCHES = (1, 32)
# Each program is timed in turn, ROUNDS times for TURN seconds and for at least LEAST calls.
ROUNDS, TURN, LEAST = 5, 0.06, 2

Call = Callable[[], Any]


class Program(NamedTuple):
    """A way to run the student: ``prepared(batch)`` returns a call that ends when its logits are there.

    ``format``: the export that it runs, or None for the student itself.
    """

    name: str
    device: torch.device
    prepared: Callable[[int], Call]
    format: str | None = None


def of_torch(build: Callable[[], nn.Module], size: int, device: torch.device) -> Iterator[Program]:
    """The network that ``build()`` makes, on ``device``, eager and compiled, over float32
    ``[B, 3, size, size]``."""

    def prepared(batch: int, compiled: bool) -> Call:
        module: Callable[..., Any] = build().to(device)
        if compiled:
            module = torch.compile(module, dynamic=False)
        images_BCHW = torch.zeros(batch, 3, size, size, device=device)

        def call() -> None:
            with torch.inference_mode():
                module(images_BCHW)
            synchronize(device)

        return call

    yield Program("torch, eager", device, lambda batch: prepared(batch, False))
    yield Program("torch.compile", device, lambda batch: prepared(batch, True))


def of_onnx(name: str, file: Callable[[], Path]) -> Program:
    """ONNX Runtime on the CPU, with torch's number of threads; ``file()`` is the path of ``name``."""

    def prepared(batch: int) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise its threads spin for a while after a call, on the next program's cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file(), options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        kind = torch.uint8 if "uint8" in entry.type else torch.float32
        images = {"images": torch.zeros(batch, *entry.shape[1:], dtype=kind).numpy()}
        return lambda: session.run(["logits"], images)

    return Program("ONNX Runtime", torch.device("cpu"), prepared, name)


def latency(programs: list[Program]) -> dict[str, Any]:
    """``latency`` of a card; docs/deployment.md describes its fields.

    A program that can't run has the reason in place of its times.
    """
    set_matmul_precision("fp32")
    rows = [row for batch in BATCHES for row in _rows(programs, batch)]
    return {
        "how": "medians of calls in turn, after warm-up, with their quartiles",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "rows": rows,
    }


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


def _rows(programs: list[Program], batch: int) -> list[dict[str, Any]]:
    torch.compiler.reset()  # other shapes would count as recompilations, which the compiler limits
    tried = [_tried(program, batch) for program in programs]
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(ROUNDS):
        for call, found in zip(tried, seconds, strict=True):
            if not isinstance(call, str):
                found += _turn(call)
    return [
        {
            "program": program.name,
            "format": program.format,
            "batch": batch,
            **_facts(program.device),
            **({"error": call} if isinstance(call, str) else _times(found)),
        }
        for program, call, found in zip(programs, tried, seconds, strict=True)
    ]


def _tried(program: Program, batch: int) -> Call | str:
    """The program after its first call, or why it can't run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers emit warnings of their own
            call = program.prepared(batch)
            call()
    except Exception as error:
        return in_one_line(error)
    return call


def _turn(call: Call) -> list[float]:
    call()  # the caches are another program's
    found: list[float] = []
    end = time.perf_counter() + TURN
    while len(found) < LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"how": "measured-cpu", "device": "cpu"}
    return {"how": "measured-gpu", "device": torch.cuda.get_device_name(device)}


def _times(seconds: list[float]) -> dict[str, Any]:
    low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return {"ms": median, "low_ms": low, "high_ms": high, "calls": len(seconds)}
