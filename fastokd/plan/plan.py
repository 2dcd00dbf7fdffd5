"""``fastokd plan``: a recipe's step on a device, counted on fake tensors and modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastokd.benchmark.step import step_flops, step_macs
from fastokd.benchmark.synthetic import num_classes
from fastokd.cohort.cohort import ENGINES
from fastokd.errors import UserError
from fastokd.learner.build import build_cohort
from fastokd.methods import method_class
from fastokd.models import least_batch, model_info
from fastokd.ops import cpp
from fastokd.plan.devices import Device, Gpu, find_device
from fastokd.plan.ops import Op
from fastokd.plan.roofline import all_reduce, fuse, launches, link_seconds, student_traffic, terms
from fastokd.plan.trace import Step, trace_ours, trace_reference
from fastokd.recipe.names import Recipe

TRAIN_IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "digits": 500,
    "fashion_mnist": 60_000,
    "glyphs": 38_068,
    "imagenet": 1_281_167,
    "stl10": 5_000,
    "svhn": 73_257,
    "tiny_imagenet": 100_000,
}


def plan(
    of: Recipe,
    device_name: str,
    gpus: int = 1,
    norm_impl: str = "auto",
    *,
    checkpoint_activations: bool = False,
) -> dict[str, Any]:
    """The facts that the command prints, under ``counted`` and ``modelled``.

    ``gpus`` GPUs share the recipe's batch. ``norm_impl``: ``"torch"`` for PyTorch's BatchNorm and max
    pooling in place of ours. With ``checkpoint_activations`` the FLOPs and peaks of a step without are
    under ``counted``, ``"without"``.

    Raises:
        UserError: students that can't take the images, or that the method refuses; an unknown
            device; fewer than one GPU, or more than images in a batch; several CPUs.
    """
    if gpus < 1:
        raise UserError(f"gpus is {gpus}: it must be at least 1")
    if gpus > of.batch_size:
        raise UserError(
            f"gpus is {gpus}, but a batch has {of.batch_size} images: give a --batch-size of at "
            f"least {gpus}"
        )
    device = find_device(device_name)
    if gpus > 1 and not isinstance(device, Gpu):
        raise UserError(f"gpus is {gpus}, but the device is cpu: name a GPU, or leave --gpus out")
    for name in dict.fromkeys(of.models):  # a student that can't take the images is refused here
        least_batch(name, num_classes(of), of.model_options, (of.image_size, of.image_size))
    cpp.ensure_built()  # without it our ops are traced as PyTorch's operators
    batch = math.ceil(of.batch_size / gpus)
    steps = _steps(of, batch, device, norm_impl, checkpoint_activations)
    if isinstance(steps["loop"], str):
        raise UserError(steps["loop"])  # the method can't take these students
    counted = _counted(of, batch, steps, device)
    if checkpoint_activations:
        usual = trace_ours(of, batch, "loop", device.precision, norm_impl)
        counted["without"] = {
            "executed_flops": usual.flops,
            "activation_bytes": usual.activation_bytes,
            "peak_bytes": usual.peak_bytes,
        }
    return {
        "recipe": of.name,
        "device": device.name,
        "precision": device.precision,
        "gpus": gpus,
        "batch_size": of.batch_size,
        "batch_size_per_gpu": batch,
        "counted": counted,
        "modelled": _modelled(of, gpus, device, steps),
    }


def _steps(
    of: Recipe, batch: int, device: Device, norm_impl: str, recomputes: bool
) -> dict[str, Step | str]:
    """Traces by name; or the reason why an engine can't take the recipe."""
    found = {
        engine: _or_reason(trace_ours, of, batch, engine, device.precision, norm_impl, recomputes)
        for engine in ENGINES
    }
    on_gpu = isinstance(device, Gpu)
    found["reference"] = _or_reason(trace_reference, of, batch, "fp32", on_gpu)
    return found


def _or_reason(trace: Callable[..., Step], *args: Any) -> Step | str:
    """The trace, or the reason why there is none."""
    try:
        return trace(*args)
    except UserError as error:
        return str(error)


def _counted(
    of: Recipe, batch: int, steps: dict[str, Step | str], device: Device
) -> dict[str, Any]:
    loop = steps["loop"]
    assert isinstance(loop, Step)
    counts = {k: step if isinstance(step, str) else launches(step.ops) for k, step in steps.items()}
    return {
        "parameters": loop.parameters,
        "macs_per_image": step_macs(of),
        "flops": step_flops(of) * batch / of.batch_size,
        "executed_flops": loop.flops,
        "bytes": loop.bytes,
        "parameter_bytes": loop.parameter_bytes,
        "gradient_bytes": loop.gradient_bytes,
        "optimizer_bytes": loop.state_bytes,
        "activation_bytes": loop.activation_bytes,
        "peak_bytes": loop.peak_bytes,
        "fits": loop.peak_bytes <= device.memory_bytes,
        "memory_bytes": device.memory_bytes,
        "launches_eager": counts,
        "layers": layers(loop.ops),
    }


def layers(ops: Sequence[Op]) -> list[dict[str, Any]]:
    """FLOPs and bytes of each layer, forward and backward; layers of one name are added over students."""
    rows: dict[str, dict[str, Any]] = {}
    for op in ops:
        parts = op.layer.split(".")
        if parts[0] == "students" and len(parts) > 1:
            parts[1] = "*"
        name = ".".join(parts) or f"({op.phase})"
        row = rows.setdefault(name, {"layer": name, "flops": 0, "bytes": 0, "launches": 0})
        row["flops"] += op.flops
        row["bytes"] += op.bytes
        row["launches"] += op.launches
    return list(rows.values())


def _modelled(
    of: Recipe, gpus: int, device: Device, steps: dict[str, Step | str]
) -> dict[str, Any]:
    ways: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        if not isinstance(step, str):
            ways |= _ways(name, step.ops, device, of.students)
    loop = steps["loop"]
    assert isinstance(loop, Step)
    gradients = all_reduce(loop.gradient_bytes, gpus)
    across = None
    if of.sharing == "network" and of.students > 1:
        across = student_traffic(of, _exchanged(of), _shared_bytes(of), gpus, device)
    default = "loop captured" if isinstance(device, Gpu) else "loop"
    sending = link_seconds(gradients, device)
    seconds = ways[default]["step_ms"] / 1e3 + sending
    least = min(ways[k]["bound_ms"] for k in ways if k != "reference") / 1e3 + sending
    return {
        "how": device.how,
        "ways": ways,
        "default": default,
        "gradient_traffic_bytes": gradients,
        "gradient_traffic_ms": 1e3 * link_seconds(gradients, device),
        "students_across_gpus_bytes": across,
        "students_across_gpus_ms": None if across is None else 1e3 * link_seconds(across, device),
        "images_per_second": of.batch_size / seconds,
        "images_per_second_at_most": of.batch_size / least,
        "hours": _hours(of, seconds),
        "hours_at_least": _hours(of, least),
    }


def _exchanged(of: Recipe) -> int:
    """Numbers an image that students exchange: logits and features, and the last map if the method
    compares maps."""
    infos = [model_info(name, num_classes(of), **of.model_options) for name in of.models]
    with_maps = method_class(of.method).needs.maps
    return sum(
        num_classes(of) + info.feature_dim + (math.prod(info.maps[-1]) if with_maps else 0)
        for info in infos
    )


def _shared_bytes(of: Recipe) -> int:
    """Bytes of the method's parameters that belong to no single student, in float32."""
    with torch.device("meta"):
        _, method = build_cohort(of, num_classes(of), image_size=of.image_size)
    return 4 * sum(p.numel() for k, p in method.named_parameters() if method.belongs_to(k) is None)


def _ways(name: str, ops: Sequence[Op], device: Device, students: int) -> dict[str, dict[str, Any]]:
    """The ways to run a step: eager; on a GPU ours also as a CUDA graph, compiled or not."""
    if isinstance(device, Gpu) and name == "vmap":
        return {}  # traced in float32
    if not isinstance(device, Gpu) or name == "reference":
        return {name: _way(ops, device, len(ops))}
    found = {
        f"{name} eager": _way(ops, device, len(ops)),
        f"{name} captured": _way(ops, device),
        f"{name} compiled + captured": _way(fuse(ops), device),
    }
    if name == "loop" and students > 1:
        found["loop captured, side by side"] = _way(ops, device, students=students)
    return found


def _way(ops: Sequence[Op], device: Device, host: int = 0, students: int = 1) -> dict[str, Any]:
    """One way to run a step: the expected time and the bound. ``host``: operators that the host
    launches; ``students``: those that run side by side."""
    found = terms(ops, device, students)
    work = least = sum(found.values())
    waiting = 0.0
    if isinstance(device, Gpu):
        waiting = host * device.host_seconds
        least = sum(map(device.bound, ops))
    return {
        "step_ms": 1e3 * max(work, waiting),
        "bound_ms": 1e3 * least,
        "kernels": launches(ops),
        "device_ms": 1e3 * work,
        "host_ms": 1e3 * waiting,
        "terms_ms": {name: 1e3 * seconds for name, seconds in found.items()},
    }


def _hours(of: Recipe, seconds: float) -> float | None:
    """Hours of all epochs, without evaluation and data; None if the number of images is unknown."""
    if of.dataset not in TRAIN_IMAGES:
        return None
    images = TRAIN_IMAGES[of.dataset]
    held_out = round(of.val * images) if isinstance(of.val, float) else of.val
    steps = math.ceil((images - held_out) / of.batch_size)
    return of.epochs * steps * seconds / 3600
