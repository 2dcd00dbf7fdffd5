"""Trains the runs of one table, one after another in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastokd.host.names import counted, on_a_line
from fastokd.host.streams import say
from fastokd.reproduce.results import Reproduction, reproduction_of
from fastokd.reproduce.wanted import Request, trainings
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.run.sweep import Train, run_all


def reproduce(request: Request, out: Path, options: RunOptions, train: Train) -> Reproduction:
    """Trains the runs that ``out`` lacks and makes the table. It can be resumed.

    Raises:
        UserError: an unknown table; errors of training.
    """
    wanted = trainings(request, options.max_steps)
    found: dict[str, Run] = {}
    for number, training in enumerate(wanted.values(), 1):
        if not options.quiet:
            say(f"run {number} of {len(wanted)}: {on_a_line(training.folder)}")
        named = (str(out / training.teacher),) if training.teacher else ()
        its = dataclasses.replace(options, teacher=named)
        (found[training.folder],) = run_all(out, [training.entry], its, train)
    made = reproduction_of(request, found, options.max_steps)
    if options.max_steps is None:
        return made
    title = f"{made.title}, stopped after {counted(options.max_steps, 'step')}"
    return dataclasses.replace(made, title=title)
