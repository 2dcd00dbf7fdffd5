"""The device, the precision, and facts on the machine."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd import __version__
from fastokd.errors import UserError
from fastokd.host import cpus

PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device by name; ``"auto"`` is the GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}: choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but this machine has no GPU: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}, but this machine's last GPU is cuda:{torch.cuda.device_count() - 1}"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: choose auto, cpu or cuda")
    return device


def use_device(name: str) -> torch.device:
    """:func:`pick_device`, made the current device, as streams, graphs and pinned memory require."""
    device = pick_device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Checks a precision; ``"auto"`` is bf16 if the device has instructions for it, else fp32."""
    if name not in PRECISIONS:
        raise UserError(f"precision is {name!r}: choose {', '.join(PRECISIONS)}")
    if name == "tf32" and device.type != "cuda":
        raise UserError("precision is 'tf32', which only GPUs have: choose bf16, fp16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu.get_capabilities()
    return "bf16" if fast.get("avx512_bf16") or fast.get("amx_bf16") else "fp32"


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU needs no wait."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_matmul_precision(precision: str) -> None:
    """Allows TF32 only for ``"tf32"``; torch allows it in convolutions by default."""
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def set_kernel_selection(device: torch.device, deterministic: bool) -> None:
    """Sets which kernels a GPU's libraries may choose, for the whole process.

    By default cuDNN times its algorithms for each shape and takes the fastest; another process may get
    another one, which rounds sums differently. ``deterministic`` allows only algorithms with
    reproducible bits; an operator without one raises. It can't be turned off again. torch's own
    deterministic switch stays on if it is on.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not (
        deterministic or torch.are_deterministic_algorithms_enabled()
    )
    if deterministic:
        # cuBLAS reads this at the process's first GEMM. It is required with several streams.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def staged(host: Tensor, device: torch.device) -> Tensor:
    """The CPU tensor ``host`` in pinned memory if ``device`` is a GPU, for a ``non_blocking`` copy.

    The allocator keeps the memory until the copy is done.
    """
    return host.pin_memory() if device.type == "cuda" else host


def moved(host: Tensor, device: torch.device) -> Tensor:
    """The CPU tensor ``host`` on ``device``, copied without a host sync."""
    return staged(host, device).to(device, non_blocking=True)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of the cohort and the method."""
    if precision in CASTS:
        return torch.autocast(device.type, CASTS[precision], cache_enabled=True)
    return nullcontext()


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """The loss scaler for fp16, whose gradients would underflow; disabled for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def release_memory(device: torch.device) -> None:
    """Returns the memory of dropped steps; a step and its graphs refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_lost(device: torch.device) -> bool:
    """Whether the GPU rejects all further calls, as after an illegal address."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Facts that a run's numbers depend on beside its recipe."""
    import torchvision

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "fastokd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "gpu": gpu,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cpus": cpus.usable_cpus(),
        "waiting": cpus.waiting(),
        "precision": precision,
        "git_commit": _git_commit(),
    }


def cpu_name() -> str:
    """The processor's model name, as the CPU reports it."""
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.processor()))


def _git_commit() -> str | None:
    """The commit of a source checkout; None for an installed package or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
