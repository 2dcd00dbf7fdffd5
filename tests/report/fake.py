"""A fake training that writes the files of a run, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastokd.checkpoint import save_checkpoint
from fastokd.errors import UserError
from fastokd.recipe.names import Recipe
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions

Accuracy = Callable[[Recipe, int], float]


class FakeTrain:
    """Stands in for :func:`fastokd.train`; ``accuracy(recipe, epoch)`` is its accuracy.

    ``stop_after`` runs it is interrupted, ``stop_at`` epochs into the next.
    """

    def __init__(self, accuracy: Accuracy, val: bool = False) -> None:
        self.accuracy = accuracy
        self.val = val
        self.calls: list[tuple[str, int, bool]] = []
        self.teachers: list[tuple[str, ...]] = []
        self.stop_after: int | None = None
        self.stop_at = 0

    def __call__(self, recipe: Recipe, options: RunOptions, **changes: Any) -> Run:
        options = replace(options, **changes)
        folder = options.out
        assert folder is not None
        if (folder / "recipe.json").exists() != options.resume:
            raise UserError(f"{folder} exists already and is never overwritten")
        self.teachers.append(options.teacher)
        stops = self.stop_after is not None and len(self.calls) == self.stop_after
        self.calls.append((recipe.name, recipe.seed, options.resume))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
        (folder / "checkpoints").mkdir(exist_ok=True)
        with open(folder / "metrics.jsonl", "a") as file:
            start = len((folder / "metrics.jsonl").read_text().splitlines())
            for epoch in range(start, recipe.epochs):
                if stops and epoch == self.stop_at:
                    raise KeyboardInterrupt
                file.write(json.dumps(self.row(recipe, epoch)) + "\n")
                # The first and the last epoch are enough.
                if epoch in (0, recipe.epochs - 1):
                    at = {"epoch": epoch + 1, "step": epoch + 1}
                    save_checkpoint(folder / f"checkpoints/last-{epoch + 1:09d}", {}, at)
        (folder / "student.safetensors").write_bytes(b"")
        return Run.load(folder)

    def row(self, recipe: Recipe, epoch: int) -> dict[str, Any]:
        top1, S = self.accuracy(recipe, epoch), recipe.students
        test = {
            "leader_top1": top1 if recipe.has_leader else None,
            "mean_top1": top1,
            "student_top1": [top1] * S,
            "ensemble_top1": top1 + 0.005,
            "ensemble_logits_top1": top1 + 0.01,
            "diversity": 0.01 / (epoch + 1) if S - recipe.has_leader > 1 else None,
        }
        if recipe.has_leader:
            test["attention"] = [[1 / (S - 1)] * (S - 1) + [0.0]] * S
        splits = {"test": test, "val": test} if self.val else {"test": test}
        return {
            "epoch": epoch,
            "step": epoch + 1,
            "seconds": 2.0,
            "images_per_second": 250.0,
            "lr": recipe.lr / (epoch + 1),
            "kd_weight": 1 - 0.5 ** (epoch + 1),
            "train": {"loss": 2.0 / (epoch + 1)},
            **splits,
        }
