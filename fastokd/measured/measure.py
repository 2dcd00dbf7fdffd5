"""All that the page of a run shows beside its metrics."""

from __future__ import annotations

import os
import shlex

from fastokd.checkpoint import list_checkpoints
from fastokd.data import DatasetSplits
from fastokd.host.names import on_a_line
from fastokd.measured.answering import answers_of
from fastokd.measured.cost import cost_of
from fastokd.run.folder import Run
from fastokd.run.hooks import spared
from fastokd.run.options import RunOptions


def measure(run: Run, data: DatasetSplits | None = None, options: RunOptions | None = None) -> None:
    """Measures the answers and the cost of ``run`` unless its folder has those of its newest step. What can't
    be measured is left out, with a warning; a folder without checkpoints, or
    that can't be written, is left as it is.

    Args:
        data: the run's data, if they are loaded already.
        options: where the data and the device are, unless where the run had them.
    """
    if not list_checkpoints(run.folder / "checkpoints") or not os.access(run.folder, os.W_OK):
        return
    later = on_a_line(f"`fastokd report {shlex.quote(str(run.folder))}` measures it later")
    spared(lambda: answers_of(run, data, options), f"no accuracy by class and mistakes ({later})")
    spared(lambda: cost_of(run, data, options), f"no cost of a step by its parts ({later})")
