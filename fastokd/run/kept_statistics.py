"""The mean and deviation that a resumed run continues with: those it began with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastokd.data import DatasetSplits
from fastokd.data.preprocessing import Preprocessing
from fastokd.distributed.ranks import speaks
from fastokd.errors import UserError, warn

# Tolerance for mean and deviation: a few changed files or another decoder change them by less.
CHANGED = 0.05
# The same for rounding: earlier versions summed in another order.
ROUNDED = 1e-9


def kept_preprocessing(data: DatasetSplits, facts: dict[str, Any]) -> Preprocessing:
    """The preprocessing of ``data`` with the mean and deviation of a checkpoint's ``facts``.

    Raises:
        UserError: the data has other classes, or statistics that differ by more than ``CHANGED``.
    """
    ours = data.preprocessing
    theirs = replace(ours, mean=tuple(facts["mean"]), std=tuple(facts["std"]))
    differing = [] if facts["class_names"] == list(data.class_names) else ["class_names"]
    changed = theirs.differences(ours, CHANGED)
    if data.with_held_out is not None:  # as a run of an earlier version measured them
        mean, std = data.with_held_out
        changed = theirs.differences(replace(ours, mean=mean, std=std), ROUNDED) and changed
    for name in [*differing, *changed]:
        raise UserError(
            f"the checkpoint was trained on other data: its {name} differ from those of "
            f"the {data.name} here; give the --data-root that it was trained on"
        )
    if theirs.differences(ours, ROUNDED) and speaks():
        warn(
            f"the images of the {data.name} here have another mean or deviation than "
            "the run began with: the folder has changed since, or an earlier fastokd measured "
            "them otherwise; the run keeps its values"
        )
    return theirs
