"""Where else a run's metrics go while it trains: TensorBoard, Weights & Biases.

Both are given the rows of ``metrics.jsonl``, so all three say the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fastokd.errors import UserError
from fastokd.recipes import Recipe


class Watcher(Protocol):
    """Is told every epoch."""

    def row(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Refuses what was asked for and isn't there, before a run leaves anything.

    Raises:
        UserError: names the package.
    """
    for wanted, name in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs {name}, which isn't here: pip install {name}")


def watchers(
    recipe: Recipe, folder: Path, first_step: int, *, tensorboard: bool, wandb: bool
) -> list[Watcher]:
    """Those that were asked for; ``first_step`` is where a resumed run goes on."""
    found: list[Watcher] = []
    if tensorboard:
        found.append(TensorBoard(folder, first_step))
    if wandb:
        found.append(WeightsAndBiases(recipe, folder))
    return found


class TensorBoard:
    """Scalars under ``RUN/tensorboard``; what a resumed run repeats replaces what it had."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in scalars(row):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of that name, with the recipe as its configuration."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        self.run = wandb.init(
            project="fastokd", name=folder.name, dir=str(folder), config=recipe.to_json()
        )

    def row(self, row: dict[str, Any]) -> None:
        self.run.log(dict(scalars(row)), step=row["step"])

    def close(self) -> None:
        self.run.finish()


def scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by name: ``test/leader_top1``, ``train/ce_S/2``; matrices left out."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list) and not any(isinstance(entry, list) for entry in value):
            yield from scalars(
                {str(index): entry for index, entry in enumerate(value)}, f"{prefix}{name}/"
            )
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
