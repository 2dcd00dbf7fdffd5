"""The GPU region of docs/plan.md: the estimates of ``fastokd plan`` and the measurements."""

from __future__ import annotations

from typing import Any

from bench.gpu.page import COHORTS, Measured, Region, count, number, ratio, table, why_blank

# Programs, and the plan's way to run each.
WAYS = {
    "eager": "loop eager",
    "captured": "loop captured",
    "grouped eager": "grouped eager",
    "grouped captured": "grouped captured",
    "compiled + captured": "loop compiled + captured",
    "grouped compiled + captured": "grouped compiled + captured",
    "published fp32": "reference",
}
# The committed report is of a version whose GPU norm was PyTorch's. A compiler fuses its own.
NORM = "torch"


def planned(cohort: str, device: str, norm_impl: str) -> dict[str, Any]:
    """``fastokd plan`` of a cohort, whose norms run by ``norm_impl``."""
    from bench.gpu.steps import large_recipe, small_recipe
    from fastokd.plan.plan import plan

    sharing, model = cohort.split(" ")
    small = model == "ResNet-32"
    name = model.lower().replace("-", "")
    of = small_recipe(sharing, False) if small else large_recipe(sharing, name, False)
    return plan(of, device, norm_impl=norm_impl)


def device_of(card: str) -> str | None:
    """The plan's name of a card; None for an unknown card."""
    from fastokd.plan.devices import GPUS

    said = card.lower().replace(" ", "")
    return next((name for name in GPUS if name in said), None)


def model(measured: Measured) -> str | None:
    """Two tables: steps, then launches and memory."""
    times, counts = [], []
    cards = {}
    for cohort in COHORTS:
        programs = measured.steps(cohort)
        if not programs:
            counts.append([cohort, *[""] * 7])
            continue
        found = next(iter(programs.values()))[0]
        device = device_of(found.card)
        cards[found.card] = found.source
        plan = None if device is None else planned(cohort, device, NORM)
        fused = None if device is None else planned(cohort, device, "auto")
        for program, way in WAYS.items():
            ms = _measured(measured, cohort, program)
            if ms is None and not _tried(measured, cohort, program):
                continue
            its = fused if "compiled" in way else plan
            found = {} if its is None else its["modelled"]["ways"].get(way, {})
            bound, modelled = found.get("bound_ms"), found.get("step_ms")
            off = ratio(modelled, ms)
            error = "" if off is None else f"{100 * (off - 1):+.0f} %"
            row = [cohort, program, number(bound), number(modelled), number(ms), error]
            times.append(row)
        counts.append(_counts(measured, cohort, plan))
    if not cards:
        return None
    heads = ["cohort", "program", "bound, ms", "modelled, ms", "measured, ms", "error"]
    more = ["cohort", "launches counted", "launched", "kernels", "kernels, captured"]
    more += ["memory counted, GB", "measured, eager", "captured"]
    return (
        f"modelled, with PyTorch's norms; {'; '.join(cards.values())}. Of `cudnn.benchmark` on and off "
        "the faster.\n\n"
        f"{table(heads, times)}\n\n"
        "The loop engine's eager step; what the profiler counted includes copies and fills.\n\n"
        f"{table(more, counts)}"
    )


def _tried(measured: Measured, cohort: str, program: str) -> bool:
    return any(name in measured.steps(cohort) for name in (program, f"{program}, benchmark"))


def _measured(measured: Measured, cohort: str, program: str, key: str = "ms") -> float | None:
    """The lower of a program's figures with and without ``cudnn.benchmark``."""
    rows = [
        row
        for name, (_, row) in measured.steps(cohort).items()
        if name in (program, f"{program}, benchmark") and why_blank(row) is None
    ]
    return min((row[key] for row in rows if key in row), default=None)


def _counts(measured: Measured, cohort: str, plan: dict[str, Any] | None) -> list[str]:
    profiled = {row["name"]: row for row in measured["profile"].rows}
    eager = profiled.get(f"{cohort} eager", {})
    launches = {k: n for k, n in eager.get("launches", {}).items() if "Launch" in k}
    counted = None if plan is None else plan["counted"]
    return [
        cohort,
        "" if counted is None else count(counted["launches_eager"]["loop"]),
        count(sum(launches.values())) if launches else "",
        count(eager.get("kernels")),
        count(profiled.get(f"{cohort} captured", {}).get("kernels")),
        "" if counted is None else number(counted["peak_bytes"] / 1e9),
        number(_measured(measured, cohort, "eager", "peak_gb")),
        number(_measured(measured, cohort, "captured", "peak_gb")),
    ]


REGIONS: dict[str, Region] = {"model": model}
