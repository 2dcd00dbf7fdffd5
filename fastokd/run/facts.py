"""A run's recipe, environment and timings, as files in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastokd.checkpoint import read_object, write_durably
from fastokd.data import DatasetSplits
from fastokd.data.held_out import DATA, listed
from fastokd.device import environment
from fastokd.errors import UserError
from fastokd.recipe.recipe import Recipe
from fastokd.run.autotuner import Timing
from fastokd.run.options import RunOptions


def run_path(recipe: Recipe, options: RunOptions) -> Path:
    """A run's folder: ``out``, or ``runs/`` and the recipe's name."""
    return options.out or Path("runs") / f"{recipe.name.replace('/', '-')}-seed{recipe.seed}"


class RunFacts:
    """``recipe.json``, ``environment.json``, ``data.json`` and ``tuning.json`` of one run.

    Writing may raise OSError; the file is then unchanged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.json"
        self.environment_file = folder / "environment.json"

    def recipe(self) -> Recipe:
        """The run's resolved recipe.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.recipe_file
        if not path.is_file():
            raise UserError(f"{self.folder} is no run folder: it has no recipe.json")
        try:
            values = json.loads(path.read_bytes())
            if isinstance(values, dict) and "ema" not in values:  # in earlier versions an option
                values["ema"] = self.environment().get("ema") or 0.0
            return Recipe.from_json(values)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} can't be read ({error}): put back the one that the run wrote"
            ) from error

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes the resolved recipe."""
        _write(self.recipe_file, recipe.to_json())

    def environment(self) -> dict[str, Any]:
        """What the run's numbers depend on beside its recipe; empty if there is no such file.

        Raises:
            UserError: the file is damaged.
        """
        return read_object(self.environment_file, "environment")

    def data(self) -> dict[str, Any]:
        """The files of the splits that fastokd drew, and those left out
        (:func:`fastokd.data.held_out.listed`); empty if there is no such file. Raises as
        :meth:`environment`."""
        return read_object(self.folder / DATA, "list of the files")

    def write_data(self, data: DatasetSplits) -> None:
        """Writes what :meth:`data` returns, if there is something."""
        if facts := listed(data):
            _write(self.folder / DATA, facts)

    def with_data(self, options: RunOptions) -> RunOptions:
        """``options`` with the data root that the run was trained on, unless they name one.

        Raises:
            UserError: that folder is gone.
        """
        known = self.environment().get("data_root")
        if options.data_root is not None or not isinstance(known, str):
            return options
        if not options.download and not Path(known).exists():
            raise UserError(
                f"the data of the run in {self.folder} lay in {known}, which is gone: give the folder "
                "that holds them now with --data-root"
            )
        return replace(options, data_root=Path(known))

    def move_data(self, data_root: str | None) -> None:
        """Writes where the data of a resumed run are now."""
        known = self.environment()
        if known and data_root not in (None, known.get("data_root")):
            _write(self.environment_file, {**known, "data_root": data_root})

    def write_environment(
        self, device: torch.device, precision: str, how: dict[str, Any], *, resumed: bool
    ) -> None:
        """Writes facts on the machine and the run's settings ``how``."""
        facts = {**environment(device, precision), **how}
        begun = self.environment() if resumed else {}
        if "init_sha256" in begun:  # a resumed run doesn't read them again
            facts.setdefault("init_sha256", begun["init_sha256"])
        _write(self.environment_file, facts)

    def write_tuning(self, timings: list[Timing]) -> None:
        """Writes the timings that the engine was chosen by."""
        _write(self.folder / "tuning.json", {"timings": [asdict(timing) for timing in timings]})


def _write(path: Path, values: dict[str, Any]) -> None:
    write_durably(path, (json.dumps(values, indent=1) + "\n").encode())
