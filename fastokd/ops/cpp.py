"""Builds the C++ of ``csrc/`` once a machine, and loads it.

``csrc/X.cpp`` holds the dispatcher's side of op X and includes ATen; ``csrc/X_kernel.cpp`` holds its
loops, is compiled once for each instruction set in ``CAPABILITIES`` and includes neither ATen nor
the C++ library: the linker could otherwise keep an inline function's AVX-512 copy for all units.
cpuid chooses which unit runs, or ``FASTOKD_CPU_CAPABILITY`` does.

Nothing is built inside a training step: an op loads the cached library or reports why there is none.
``python -m fastokd.ops`` builds, and so does ``fastokd.train`` before its first step.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

import fastokd.csrc
from fastokd.host.caches import cache_root, cache_roots
from fastokd.host.cpus import usable_cpus

COMMAND = "python -m fastokd.ops"

# No -march=native (a library shared by unlike nodes) and no -ffast-math (loading it would turn
# denormals off for the whole process, and it breaks isinf).
COMMON = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
GLUE = ("-O2", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")
KERNEL = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
    "-Wno-uninitialized",  # GCC's own intrinsics
    "-Wno-maybe-uninitialized",
)
X86 = {
    "default": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
}
CAPABILITIES = X86 if platform.machine() in ("x86_64", "AMD64") else {"default": ()}

_library: ctypes.CDLL | None = None
_reason: str | None = None


class BuildError(RuntimeError):
    """Why the C++ ops can't be built here, in one sentence."""


def load() -> str | None:
    """Loads the cached library; None, or why there is none. Builds nothing; reads the disk once."""
    global _reason
    if _library is None and _reason is None:
        try:
            path = _cached()
            if path is None:
                _reason = f"the C++ ops are not built: run `{COMMAND}`"
            else:
                _open(path)
        except (BuildError, OSError) as error:
            _reason = str(error)
    return _reason


def ensure_built() -> str | None:
    """Builds where the cache has no library, then loads; None, or why that failed."""
    global _reason
    if _library is None:
        try:
            _open(build())
            _reason = None
        except (BuildError, OSError) as error:
            _reason = str(error)
    return _reason


def build() -> Path:
    """The library's path, compiled if the cache has none. One process of a node builds, others wait.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: no folder for caches can be written.
    """
    if sys.platform != "linux":
        raise BuildError(f"the C++ ops are for Linux, not {sys.platform}")
    path = _cached()
    if path is not None:
        return path
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler: none of $CXX, c++, g++, clang++ was found")
    folder = cache_root() / _folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        with suppress(OSError):  # a file system without locks: each process builds its own
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system drops it if this process dies
            for leftover in folder.glob("build-*"):
                shutil.rmtree(leftover)
        path = _cached()
        if path is not None:
            return path
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
            built = _compile(compiler, Path(work))
            path = folder / f"ops-{_version_digest(compiler)}-{_digest(built)}.so"
            os.replace(built, path)
    return path


def find_compiler() -> str | None:
    """``$CXX``, else the first usual name on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def capability() -> str:
    """The instruction set whose kernels run in this process (the library must be loaded)."""
    assert _library is not None
    name: bytes = _library.fastokd_capability()
    return name.decode()


def set_capability(name: str) -> bool:
    """Switches to other kernels, for the tests; False where this CPU can't run them."""
    assert _library is not None
    return bool(_library.fastokd_set_capability(name.encode()))


def multiply_adds(rounds: int, *, bf16: bool) -> int:
    """Runs independent multiply-adds on registers, ``rounds`` times; returns their FLOPs, 0 without the
    library or the instruction. Other threads run meanwhile."""
    if load() is not None:
        return 0
    assert _library is not None
    return rounds * int(_library.fastokd_multiply_adds(rounds, bf16))


def busy_threads() -> int:
    """How many threads have run a part of a C++ loop since the last call, for the tests."""
    assert _library is not None
    return int(_library.fastokd_busy_threads())


def extra_flags() -> list[str]:
    """``$FASTOKD_CXXFLAGS``, for every unit and the link (the proofs build with sanitizers)."""
    return os.environ.get("FASTOKD_CXXFLAGS", "").split()


def sources() -> list[Path]:
    """Every C++ file of the package, headers included."""
    folder = Path(fastokd.csrc.__path__[0])
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


def _folder_name() -> str:
    """The folder of the libraries of this torch, these flags and these sources."""
    digest = hashlib.sha256()
    abi = torch.compiled_with_cxx11_abi()
    flags = (COMMON, GLUE, KERNEL, CAPABILITIES, extra_flags())
    digest.update(repr((torch.__version__, abi, flags)).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"cpp-{digest.hexdigest()[:20]}"


@functools.cache
def _version(compiler: str) -> str:
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    if run.returncode:
        raise BuildError(f"the C++ compiler {compiler} doesn't answer --version: {_tail(run)}")
    return run.stdout


def _version_digest(compiler: str) -> str:
    return hashlib.sha256(_version(compiler).encode()).hexdigest()[:12]


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:12]


def _cached() -> Path | None:
    """The library of this compiler; any compiler's where the machine has none (built at install).

    A damaged library, which could crash the process, is ignored.
    """
    compiler = find_compiler()
    pattern = f"ops-{_version_digest(compiler) if compiler else '*'}-*.so"
    for root in cache_roots():
        with suppress(OSError):
            for path in sorted((root / _folder_name()).glob(pattern)):
                if path.stem.endswith(f"-{_digest(path)}"):
                    return path
    return None


def _open(path: Path) -> None:
    global _library
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.fastokd_capability.restype = ctypes.c_char_p
    library.fastokd_set_capability.argtypes = [ctypes.c_char_p]
    library.fastokd_multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.fastokd_multiply_adds.restype = ctypes.c_int64
    wanted = os.environ.get("FASTOKD_CPU_CAPABILITY")
    if wanted and not library.fastokd_set_capability(wanted.encode()):
        raise BuildError(
            f"FASTOKD_CPU_CAPABILITY is {wanted!r}: this CPU runs "
            f"{', '.join(name for name in (*CAPABILITIES, 'avx512bf16') if library.fastokd_set_capability(name.encode()))}"
        )
    _library = library


def _compile(compiler: str, work: Path) -> Path:
    """Compiles every unit in ``work``, as many at once as there are CPUs, and links them."""
    root = Path(torch.__path__[0])
    include = [f"-isystem{root / 'include'}", f"-isystem{root}/include/torch/csrc/api/include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    commands: list[list[str]] = []
    objects: list[str] = []
    for source in sources():
        if source.suffix == ".h":
            continue
        units: list[tuple[str, list[str]]]
        if source.stem.endswith("_kernel"):
            units = [
                (f"{source.stem}.{name}.o", [*KERNEL, *flags, f"-DFASTOKD_CAPABILITY={name}"])
                for name, flags in CAPABILITIES.items()
            ]
        else:
            x86 = [f"-DFASTOKD_X86={int(CAPABILITIES is X86)}"]
            units = [(f"{source.stem}.o", [*GLUE, *x86, abi, *include])]
        for name, flags in units:
            objects.append(str(work / name))
            flags = [*COMMON, *flags, *extra_flags()]
            commands.append([compiler, *flags, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(_run, commands))
    library = work / "ops.so"
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-fopenmp"]
    _run([compiler, "-shared", *extra_flags(), *objects, *libraries, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BuildError(f"the C++ compiler failed ({' '.join(command[-4:])}): {_tail(run)}")


def _tail(run: subprocess.CompletedProcess[str]) -> str:
    errors = [line for line in run.stderr.splitlines() if "error" in line] or [run.stderr.strip()]
    return errors[0][:500] or f"exit status {run.returncode}"
