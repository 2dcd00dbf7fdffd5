"""The cost of a training step by its parts, as one bar and a table."""

from __future__ import annotations

from typing import NamedTuple

from fastokd.host.names import in_html
from fastokd.measured.cost import Cost, per_step
from fastokd.report.html_tables import as_html
from fastokd.report.tables import Column, Table
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run

ABOUT = {
    "data": "from the loader to the images as the students see them",
    "forward": "of the cohort",
    "loss": "of the method",
    "backward": "",
    "update": "the optimizers and all that remains",
    "evaluation": "all evaluations of the run, divided by its steps",
}


class Part(NamedTuple):
    """Seconds of a part of one step, and how they were got."""

    name: str
    seconds: float
    how: str


def parts_of(cost: Cost, run: Run) -> list[Part]:
    """The parts of a step, and the run's evaluation spread over its steps."""
    medians = f"{cost.how}, median of {cost.steps} steps"
    parts = [Part(name, seconds, medians) for name, seconds in cost.seconds.items()]
    evaluation = per_step(run).get("evaluation")
    if evaluation is not None:
        on = "gpu" if RunFacts(run.folder).environment().get("gpu") else "cpu"
        parts.append(Part("evaluation", evaluation, f"measured-{on}, metrics.jsonl"))
    return parts


def cost_section(cost: Cost, run: Run) -> str:
    """The bar, the table and what they are compared with, as HTML."""
    parts = parts_of(cost, run)
    total = sum(part.seconds for part in parts)
    pieces = "".join(
        f'<span class="part" style="flex-grow:{part.seconds / total:.4f};--hue:var(--c{index})">'
        f"{in_html(part.name) if part.seconds > 0.08 * total else ''}</span>"
        for index, part in enumerate(parts)
    )
    rows = tuple(
        (
            part.name,
            f"{1e3 * part.seconds:.3f}",
            f"{100 * part.seconds / total:.1f}",
            part.how,
            about,
        )
        for part, about in ((part, ABOUT.get(part.name, "")) for part in parts)
    )
    columns = (
        Column("part", text=True),
        Column("ms a step"),
        Column("%"),
        Column("how", text=True),
        Column("what", text=True),
    )
    table = Table("cost", "Cost of a training step", columns, rows, (_note(cost, run),))
    return f'<div class="stack" aria-hidden="true">{pieces}</div>{as_html(table)}'


def _note(cost: Cost, run: Run) -> str:
    note = (
        f"Eager steps of {cost.batch} images on {cost.device}, {cost.precision}, engine {cost.engine}, each part "
        f"followed by a synchronisation: together {1e3 * cost.total:.3f} ms. The bar has the parts in this order."
    )
    training = per_step(run).get("training")
    if training is None:
        return note
    note += f" The run itself took {1e3 * training:.3f} ms a step of a whole batch (metrics.jsonl, median of epochs)."
    loader = per_step(run).get("loader")
    return (
        note
        if loader is None
        else f"{note} It waited {1e3 * loader:.3f} ms of that for the loader."
    )
