"""``fastokd bench --gpu-report FILE``: everything that the GPU columns of the tables are made of.

One JSON file: what the machine is, whether every fused form agrees with its plain one, how long
steps and kernels take. It runs without a GPU too, and then says that its figures fill no column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastokd.benchmark.claims import Claim, measure, rounds
from fastokd.benchmark.kernels import measure_kernels
from fastokd.device import environment, pick_device, pick_precision
from fastokd.doctor import diagnose
from fastokd.errors import UserError
from fastokd.plan.plan import plan
from fastokd.recipes import recipe

NO_GPU = "there is no GPU here: these are a CPU's figures and belong in no GPU column"


def gpu_report(
    claims: Sequence[Claim],
    *,
    device: str = "auto",
    steps: int = 50,
    scale: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report; ``say`` is told what comes next. ``scale`` shrinks the kernels' batches."""
    found = pick_device(device)
    on_gpu = found.type == "cuda"
    report: dict[str, Any] = {
        "note": "measured-gpu" if on_gpu else NO_GPU,
        "how": "measured-gpu" if on_gpu else "measured-cpu",
        "environment": environment(found, pick_precision("auto", found)),
        "doctor": diagnose(),
        "kernels": [],
        "steps": [],
        "plans": [],
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(found)
        report["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    say("kernels")
    report["kernels"] = measure_kernels(found, scale=scale)
    for claim in claims:
        say(claim.title)
        try:
            outcome = measure(claim, rounds(steps), device=str(found))
            report["steps"].append(outcome.to_json())
        except UserError as error:  # one refusal mustn't lose what the others found
            report["steps"].append({"claim": claim.name, "refused": str(error)})
        of = recipe(claim.recipe, batch_size=claim.batch_size)
        report["plans"].append({**plan(of, "h100"), "claim": claim.name})
    return report
