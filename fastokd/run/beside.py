"""Measurements beside a run, of its newest checkpoint: they change nothing of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fastokd.checkpoint import run_checkpoint
from fastokd.data import DatasetSplits
from fastokd.device import pick_device, pick_precision, release_memory
from fastokd.distributed.ranks import alone
from fastokd.recipe.recipe import Recipe
from fastokd.run.build import build
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.run.session import Session


@contextmanager
def beside(
    run: Run, data: DatasetSplits | None, options: RunOptions | None, *, training: bool
) -> Iterator[Session]:
    """A session of its own at the newest checkpoint of ``run``, in its precision, with its engine, and on its
    device if that is here. The steps are eager.

    This process acts alone, also where it is one of several ranks; torch's global generators are restored.

    Args:
        data: the run's data, if they are loaded already.
        options: where the data and the device are, unless where the run had them.
        training: whether steps are taken (:func:`fastokd.run.build.build`); of a run on several ranks, over
            one rank's share of a batch.

    Raises:
        UserError: the run has no checkpoint, or its data or its device can't be used.
    """
    with alone():
        _, tensors, facts = run_checkpoint(run.folder)
        recipe = Recipe.from_json(facts.get("recipe"))
        its = _options(run, options or RunOptions())
        if training:
            begun = RunFacts(run.folder).environment()
            # Ranks that share the students have the same rows of the batch.
            ranks = max(1, int(begun.get("rows", begun.get("ranks", 1))))
            recipe = replace(recipe, batch_size=max(1, recipe.batch_size // ranks))
            facts["recipe"] = recipe.to_json()
        device = pick_device(its.device)
        release_memory(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            session = build(recipe, its, training=training, data=data)
            session.load_state(tensors, facts)
            yield session


def measured_on(device: torch.device) -> str:
    """How a figure was got that was measured on ``device``."""
    return "measured-gpu" if device.type == "cuda" else "measured-cpu"


def _options(run: Run, asked: RunOptions) -> RunOptions:
    """The options of ``run``, where this machine has them, without ranks and compiled or captured steps."""
    begun = RunFacts(run.folder).environment()
    begun |= {"compile": False, "capture": False, "streams": False}
    begun |= {"sync_bn": False, "deterministic": False, "init": []}
    device = asked.device if asked.device != "auto" else str(begun.get("device", "auto"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
    elif asked.device == "auto" and device[5:].isdigit():
        device = device if int(device[5:]) < torch.cuda.device_count() else "cuda"
    if not str(begun.get("device", device)).startswith(device[:4]):
        begun |= {"impl": "auto", "apex": False}
    begun["device"] = device
    if begun.get("precision") == "tf32" and pick_device(device).type == "cpu":
        begun["precision"] = pick_precision("fp32", pick_device(device))
    where = RunOptions(
        data_root=asked.data_root,
        download=asked.download,
        workers=asked.workers,
        out=run.folder,
        resume=True,
        quiet=True,
    )
    return replace(
        RunFacts(run.folder).with_data(where).as_begun(begun, run.folder), out=run.folder
    )
