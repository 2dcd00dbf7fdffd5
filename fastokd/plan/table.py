"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MB, GB = 1e6, 1e9


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan as lines of text; each figure is under a heading that says how it was got."""
    counted, modelled = plan["counted"], plan["modelled"]
    share = f", {plan['batch_size_per_gpu']} on each of {plan['gpus']} GPUs"
    yield (
        f"{plan['recipe']} on {plan['device']}, {plan['precision']}, batch {plan['batch_size']}"
        f"{share if plan['gpus'] > 1 else ''}"
    )
    yield "counted"
    yield f"  parameters        {counted['parameters']:,}"
    yield f"  FLOPs a step      {counted['flops'] / GB:.1f} G (6 x MACs x batch)"
    yield f"  bytes a step      {counted['bytes'] / MB:,.0f} MB (eager, loop)"
    yield (
        f"  memory            {counted['peak_bytes'] / MB:,.0f} MB at the peak, "
        f"{counted['activation_bytes'] / MB:,.0f} MB of it activations: "
        f"{'fits' if counted['fits'] else 'does not fit'} in {counted['memory_bytes'] / GB:.0f} GB"
    )
    if without := counted.get("without"):
        more = counted["executed_flops"] / without["executed_flops"] - 1
        yield (
            f"  checkpointing     saves {(without['peak_bytes'] - counted['peak_bytes']) / MB:,.0f} MB of "
            f"{without['peak_bytes'] / MB:,.0f} MB at the peak, costs {100 * more:.0f} % more FLOPs"
        )
    eager = ", ".join(f"{name} {count}" for name, count in counted["launches_eager"].items())
    yield f"  launches, eager   {eager}"
    yield f"  {'layer':34} {'MFLOP':>10} {'MB':>8}"
    for row in _by_stage(counted["layers"]):
        yield f"  {row['layer']:34} {row['flops'] / 1e6:10,.0f} {row['bytes'] / MB:8,.1f}"
    yield modelled["how"]
    yield (
        f"  {'way':27} {'step ms':>8} {'bound':>8} {'kernels':>8} {'host ms':>8}  terms of the step, ms"
    )
    for name, way in modelled["ways"].items():
        terms = ", ".join(f"{term} {ms:.3g}" for term, ms in way["terms_ms"].items())
        yield (
            f"  {name:27} {way['step_ms']:8.3g} {way['bound_ms']:8.3g} {way['kernels']:8} "
            f"{way['host_ms']:8.3g}  {terms}"
        )
    if plan["gpus"] > 1:
        yield (
            f"  gradients         {modelled['gradient_traffic_bytes'] / MB:,.1f} MB a step from "
            f"each GPU, {modelled['gradient_traffic_ms']:.3g} ms"
        )
        if modelled["students_across_gpus_bytes"] is not None:
            yield (
                f"  students on GPUs  {modelled['students_across_gpus_bytes'] / MB:,.1f} MB a step "
                f"from each GPU, {modelled['students_across_gpus_ms']:.3g} ms"
            )
    yield (
        f"  images/s          about {modelled['images_per_second']:,.0f} ({modelled['default']}), "
        f"at most {modelled['images_per_second_at_most']:,.0f}"
    )
    hours, least = modelled["hours"], modelled["hours_at_least"]
    told = "unknown" if hours is None else f"about {hours:.3g}, at least {least:.3g}"
    yield f"  hours             {told}"


def _by_stage(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the layers of a stage: the first two parts of a name (three of a student's)."""
    rows: dict[str, dict[str, Any]] = {}
    for layer in layers:
        parts = layer["layer"].split(".")
        name = ".".join(parts[: 3 if parts[0] == "students" else 2])
        row = rows.setdefault(name, {"layer": name, "flops": 0, "bytes": 0})
        row["flops"] += layer["flops"]
        row["bytes"] += layer["bytes"]
    return list(rows.values())
