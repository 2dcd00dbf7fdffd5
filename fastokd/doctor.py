"""What works on this machine, and why the rest doesn't."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from fastokd.device import pick_device, pick_precision
from fastokd.ops._dispatch import IMPLS, unavailable
from fastokd.optimizers import apex_missing

OPTIONAL = {
    "nvidia-dali-cuda120": "pip install fastokd[dali-cuda12]",
    "nvidia-dali-cuda130": "pip install fastokd[dali-cuda13]",
    "tensorboard": "pip install fastokd[tensorboard]",
    "onnxruntime": "pip install fastokd[onnx]",
    "timm": "pip install timm",
}


def diagnose() -> dict[str, Any]:
    """Versions, devices, implementations of the ops and optional packages, each with its reason."""
    device = pick_device("auto")
    impls = {impl: unavailable(impl, device) or "works" for impl in IMPLS}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "device": str(device),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "precision": pick_precision("auto", device),
        "impls": impls,
        "optional": {
            **{name: _version(name) or f"not installed: {how}" for name, how in OPTIONAL.items()},
            "apex": apex_missing() or "works",
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
