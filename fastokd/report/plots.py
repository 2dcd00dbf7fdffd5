"""The curves of a run as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastokd.recipes import Recipe


def plot_curves(rows: list[dict[str, Any]], recipe: Recipe, folder: Path) -> None:
    """Draws loss, accuracy of each student and diversity over epochs.

    Leaves ``curves.png`` and ``curves.svg`` in ``folder``.
    """
    # A canvas of its own: no display, and no state shared with a caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, diversity = figure.subplots(1, 3)
    epochs = [row["epoch"] + 1 for row in rows]
    loss.plot(epochs, [row["train"]["loss"] for row in rows])
    loss.set(title="training loss, all students", xlabel="epoch", yscale="log")

    measured = [row for row in rows if "test" in row]
    at = [row["epoch"] + 1 for row in measured]
    for student in range(recipe.students):
        leader = recipe.has_leader and student == recipe.students - 1
        accuracy.plot(
            at,
            [100 * row["test"]["student_top1"][student] for row in measured],
            label="leader" if leader else f"student {student}",
            color="black" if leader else None,
            linewidth=2 if leader else 1,
        )
    if recipe.students > 1:
        ensemble = [100 * row["test"]["ensemble_top1"] for row in measured]
        accuracy.plot(at, ensemble, "--", label="ensemble", color="gray")
    accuracy.set(title=f"test top-1, {recipe.dataset} (%)", xlabel="epoch")
    accuracy.legend(fontsize="small")

    spread = [row["test"]["diversity"] for row in measured]
    if any(value is not None for value in spread):
        diversity.plot(at, spread)
    else:
        diversity.text(0.5, 0.5, "needs two peers", ha="center", transform=diversity.transAxes)
    diversity.set(title="diversity of the peers, test", xlabel="epoch")
    figure.suptitle(recipe.name)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"curves.{suffix}", dpi=120)
