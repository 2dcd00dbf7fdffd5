"""Compiling kernels for GPUs that aren't here, by the launchers' own specialisation.

A launcher is called with tensors of the CPU while Triton believes in a GPU of the target and every
launch stops after compilation: so signature, attributes and constexprs are those that the launcher
would specialise to. The disassemblers of the Triton wheel then say what the machine code does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s*(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)", re.M)
_GCN = re.compile(r"^\s+((?:global|buffer|flat|scratch)_(?:load|store|atomic)\w*)", re.M)
_GCN_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def skip_where_triton_spills(target: str) -> None:
    """Triton 3.6 spills up to four registers in three launches on AMD, and 3.8 in none."""
    if target == "gfx942" and triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 spills on gfx942: run this with Triton 3.8")


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel is: per thread, except for the warps."""

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    """Bytes of stack and local memory, local loads and stores; on AMD spilled registers, scratch."""
    loads: tuple[tuple[int, int], ...]
    """Global loads as (bytes, count), widest first; likewise stores."""
    stores: tuple[tuple[int, int], ...]
    atomics: int
    products: int
    """Matrix products, which Triton rounds to TF32."""

    def width(self, accesses: str) -> int:
        """The width by which most bytes of ``loads`` or ``stores`` travel."""
        return max(getattr(self, accesses), key=lambda entry: entry[0] * entry[1])[0]


class _Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[Any]]:
    """Launches in this block compile for ``target``; what they compile to is in the list."""
    compiled: list[Any] = []
    run, driver = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(_Driver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = driver


def facts(launch: Callable[[], object], target: str) -> list[Facts]:
    """Of every kernel that ``launch`` launches, in order."""
    with compiling_for(target) as compiled:
        launch()
    return [_of_amd(k, target) if "amdgcn" in k.asm else _of_nvidia(k, target) for k in compiled]


def _of_nvidia(kernel: Any, target: str) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", str(path))
        operations = Counter(_SASS.findall(_output("nvdisasm", "-c", str(path))))
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    local = sum(n for name, n in operations.items() if re.match(r"LDL|STL", name))
    return Facts(
        kernel.metadata.name,
        target,
        kernel.metadata.num_warps,
        int(used["REG"]),
        int(used["STACK"]) + int(used["LOCAL"]) + local,
        _by_width(operations, lambda name: name.startswith("LDG") and _sass_bytes(name)),
        _by_width(operations, lambda name: name.startswith("STG") and _sass_bytes(name)),
        sum(n for name, n in operations.items() if re.match(r"ATOM|RED\b", name)),
        _products(kernel),
    )


def _products(kernel: Any) -> int:
    return len(re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot)\b", kernel.asm["ttgir"]))


def _sass_bytes(name: str) -> int:
    modifiers = name.split(".")
    for bits, count in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if bits in modifiers:
            return count
    return 4


def _of_amd(kernel: Any, target: str) -> Facts:
    text = kernel.asm["amdgcn"]

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found.group(1))

    operations = Counter(_GCN.findall(text))
    spills = ("sgpr_spill_count", "vgpr_spill_count", "private_segment_fixed_size")
    scratch = sum(n for name, n in operations.items() if name.startswith("scratch"))
    return Facts(
        kernel.metadata.name,
        target,
        kernel.metadata.num_warps,
        entry("vgpr_count"),
        sum(entry(name) for name in spills) + scratch,
        _by_width(operations, lambda name: "_load_" in name and _gcn_bytes(name)),
        _by_width(operations, lambda name: "_store_" in name and _gcn_bytes(name)),
        sum(n for name, n in operations.items() if "_atomic" in name),
        _products(kernel),
    )


def _gcn_bytes(name: str) -> int:
    unit = re.sub(r"_d16(_hi)?$", "", name).rsplit("_", 1)[-1]
    return _GCN_BYTES[unit[1:] if unit[1:] in _GCN_BYTES else unit]


def _by_width(
    operations: Counter[str], width: Callable[[str], int | bool]
) -> tuple[tuple[int, int], ...]:
    found: Counter[int] = Counter()
    for name, count in operations.items():
        if width(name):
            found[int(width(name))] += count
    return tuple(sorted(found.items(), reverse=True))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(_BIN / tool), *arguments], check=True, capture_output=True, text=True
    ).stdout
