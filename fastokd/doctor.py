"""Reports what works on this machine, and the reasons for what doesn't."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from fastokd.data.disk import nvjpeg
from fastokd.device import pick_device, pick_precision
from fastokd.host import cpus
from fastokd.host.caches import cache_root
from fastokd.learner.optimizers import apex_missing
from fastokd.ops import cpp
from fastokd.ops.dispatch import IMPLS, choose, unavailable
from fastokd.ops.fusion_step import ON_A_CPU

OPS = (
    *("mixture_distillation", "peer_attention_distillation"),
    *("decoupled_distillation", "correlation_distillation"),
    *("attention_map", "attention_transfer", "attention_diversity", "feature_transfer"),
    *("shifted_map", "fusion_step", "fused_bn_act", "memory_contrast"),
)

# The optional packages, by their names on PyPI, and how each is installed.
OPTIONAL = {
    "nvidia-dali-cuda120": "pip install fastokd[dali-cuda12]",
    "nvidia-dali-cuda130": "pip install fastokd[dali-cuda13]",
    "tensorboard": "pip install fastokd[tensorboard]",
    "wandb": "pip install wandb",
    "timm": "pip install fastokd[timm]",
    "onnx": "pip install fastokd[onnx]",
    "onnxruntime": "pip install fastokd[onnx]",
    "onnxscript": "pip install fastokd[onnx]",
    "huggingface_hub": "pip install huggingface_hub",
    "datasets": "pip install fastokd[hf]",
    "pyarrow": "pip install fastokd[hf]",
}


def diagnose() -> dict[str, Any]:
    """Versions, devices, implementations of the ops and optional packages; reasons for what is missing."""
    device = pick_device("auto")
    if device.type == "cpu":
        cpp.ensure_built()
    impls = {impl: unavailable(impl, device) or "works" for impl in IMPLS}
    ops = {op: _serving(op, device) for op in OPS}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "device": str(device),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "cpus": cpus.said(),
        "cache": str(cache_root()),
        "precision": pick_precision("auto", device),
        "impls": impls,
        "ops": ops,
        "optional": {
            **{name: _version(name) or f"not installed: {how}" for name, how in OPTIONAL.items()},
            "apex": apex_missing() or "works",
            "nvjpeg": (
                nvjpeg.why_not(device) or "works" if device.type == "cuda" else "it needs a GPU"
            ),
        },
    }


def _serving(op: str, device: torch.device) -> str:
    """The implementation that ``impl="auto"`` picks on ``device`` for common inputs, and why."""
    refusals = {"cpp": ON_A_CPU if op == "fusion_step" else None, "triton": None}
    chosen = choose(op, "auto", device, refusals)
    others = {impl: unavailable(impl, device) or refusals[impl] for impl in refusals}
    reasons = [f"{impl}: {why}" for impl, why in others.items() if impl != chosen and why]
    return f"{chosen} ({'; '.join(reasons)})" if reasons else chosen


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
