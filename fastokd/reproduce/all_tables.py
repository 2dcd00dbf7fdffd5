"""``fastokd reproduce all``: its options, plan and result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastokd.checkpoint import read_object
from fastokd.distributed.launch import launched
from fastokd.errors import Interrupted, UserError
from fastokd.host.names import counted
from fastokd.recipe.cells import cells_of
from fastokd.report.tables import Column, Table
from fastokd.reproduce.drawn import BATCH, FIRST_STEPS, FOLDER, STEPS, write_drawn
from fastokd.reproduce.everything import Everything, Tell, places, summary
from fastokd.reproduce.order import RULE, Job, in_hours
from fastokd.reproduce.page import STEM, write_page
from fastokd.reproduce.speeds import HOW
from fastokd.reproduce.wanted import Request
from fastokd.reproduce.workers import train_all
from fastokd.run.durations import seconds_of
from fastokd.run.options import RunOptions

# Of both papers; those of newer methods are asked for by name.
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6", "figure3", "ffsd")


@dataclass(frozen=True)
class Asked:
    """The command line. ``request``: for each table; ``budget``: as ``24h``, or None."""

    request: Request
    out: Path | None
    options: RunOptions
    budget: str | None
    processes: int | None
    drawn: bool

    @property
    def hours(self) -> float:
        """The budget; infinite without one."""
        return math.inf if self.budget is None else seconds_of(self.budget, "--budget") / 3600


def everything_of(asked: Asked, tell: Tell) -> Everything:
    """The runs that are asked for, with their data looked for.

    Raises:
        UserError: nothing is selected; a folder of something else; a bad budget or device; torchrun.
    """
    if launched() > 1:
        raise UserError("torchrun started this: start it without, --processes N uses N GPUs")
    _ = asked.hours  # a bad budget is refused before anything is read
    out = asked.out or Path("runs") / f"reproduce{'-drawn' * asked.drawn}"
    requests, options = _requests(asked.request), asked.options
    if out.exists() and not (out / "claims").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no reproduction: choose another --out")
    if asked.drawn:
        for name, given in (("dataset", asked.request.dataset), ("max-steps", options.max_steps)):
            if given is not None:
                raise UserError(f"--drawn has its own images and steps: leave --{name} out")
        # A batch of four trains a step of any network within seconds on a CPU. At the published rate
        # ResNet-110 diverges on so few images.
        requests = [replace(one, seeds=(0,), batch_size=BATCH, lr=0.001) for one in requests]
        options = replace(options, max_steps=STEPS, data_root=out / FOLDER)
    first = FIRST_STEPS if asked.drawn else None
    of = Everything(requests, out, options, places(options, asked.processes), tell, first)
    try:
        (out / "claims").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error}): choose another --out") from error
    if asked.drawn:
        tell(f"drawing images in {options.data_root}")
        write_drawn(out, {one.entry.recipe.dataset for one in of.trainings.values()})
    of.find_data()
    return of


def _requests(asked: Request) -> list[Request]:
    """A request for each table that ``only`` names, or that has a cell of it."""
    if asked.only in TABLES:
        return [replace(asked, table=asked.only, only="")]
    names = [t for t in TABLES if any(asked.only in cell.recipe for cell in cells_of(t))]
    if not names:
        raise UserError(
            f"--only {asked.only!r} leaves no cell: name a table ({', '.join(TABLES)}) or a part of a "
            "recipe's name, such as resnet32/cifar100"
        )
    return [replace(asked, table=name) for name in names]


def plan_of(of: Everything, asked: Asked) -> tuple[dict[str, Any], Table]:
    """What ``--dry-run`` prints: the facts as JSON, and a row for each comparison, in order."""
    if not asked.drawn:
        of.measure(asked.hours)
    at = of.standings()
    hours, jobs = of.estimates(at), {job.folder: job for job in of.plan(asked.hours)}
    runs = [
        {
            "run": name,
            "recipe": of.trainings[name].entry.recipe.name,
            "seed": of.trainings[name].entry.recipe.seed,
            "state": at[name].state,
            "note": at[name].note,
            "hours_left": None if math.isinf(hours[name].hours) else hours[name].hours,
            "speed": hours[name].how,
            "estimated_by": HOW[hours[name].how],
            "plan": _planned(jobs.get(name), at[name].state),
            "start": jobs[name].start if name in jobs else None,
        }
        for name in of.order(at)
    ]
    facts = {
        "budget_hours": None if math.isinf(asked.hours) else asked.hours,
        "processes": len(of.places),
        "machine": of.speeds.machine,
        "rule": RULE,
        "runs": runs,
    }
    return facts, _plan_table(of, asked, runs)


def _planned(job: Job | None, state: str) -> str:
    if job is None:
        return state
    return "a part" if job.part else "doesn't fit" if job.end is None else "fits"


def _plan_table(of: Everything, asked: Asked, runs: Sequence[dict[str, Any]]) -> Table:
    by_name = {run["run"]: run for run in runs}
    places_ = {run["run"]: number for number, run in enumerate(runs)}
    rows = []
    for one in sorted(of.comparisons, key=lambda c: max(map(places_.__getitem__, c.folders()))):
        mine = [by_name[name] for name in one.folders()]
        plans = [run["plan"] for run in mine]
        left = [run["hours_left"] for run in mine if run["plan"] != "done"]
        ways = dict.fromkeys(run["speed"] for run in mine if run["plan"] != "done")
        rows.append(
            (
                *(one.table, one.row, one.dataset, len(mine)),
                in_hours(math.inf if None in left else sum(left)) if left else "",
                ", ".join(f"{plans.count(plan)} {plan}" for plan in dict.fromkeys(plans)),
                "; ".join(ways),
            )
        )
    columns = (
        Column("table", text=True),
        Column("row", text=True),
        Column("data", text=True),
        Column("runs"),
        Column("time left"),
        Column("plan", text=True),
        Column("speed", text=True),
    )
    used = dict.fromkeys(run["speed"] for run in runs)
    ways_said = [f"Speed {way}: by {HOW[way]}." for way in used]
    unfinished = [run for run in runs if run["plan"] != "done"]
    fits = [run for run in unfinished if run["plan"] == "fits"]
    total = in_hours(sum(run["hours_left"] or 0.0 for run in fits))
    where = f"{asked.budget or 'unlimited time'} on {len(of.places)} x {of.speeds.machine}"
    title = (
        f"{len(fits)} of {counted(len(unfinished), 'run')} that are left fit {where}: about {total}"
    )
    return Table("plan", title, columns, tuple(rows), (RULE, *ways_said), grouped=True)


def reproduce_all(of: Everything, asked: Asked) -> tuple[dict[str, Any], Table]:
    """Trains within the budget and writes the page; returns its facts and a row for each table.

    Raises:
        Interrupted: a signal; all is saved, and the page written.
    """
    if asked.budget is not None and not asked.drawn:
        of.measure(asked.hours)
    try:
        train_all(of, asked.hours, partial(write_page, of, drawn=asked.drawn))
    except Interrupted:
        write_page(of, drawn=asked.drawn)
        raise
    write_page(of, drawn=asked.drawn)
    facts = read_object(of.out / f"{STEM}.json", "reproduction")
    rows = []
    for request in of.requests:
        cells = [cell for cell in facts["cells"] if cell["table"] == request.table]
        whole = sum(cell["state"] == "done" for cell in cells)
        rest = dict.fromkeys(cell["state"] for cell in cells if cell["state"] != "done")
        rows.append((request.table, len(cells), whole, "; ".join(rest)))
    columns = (
        Column("table", text=True),
        Column("cells"),
        Column("done"),
        Column("the others", text=True),
    )
    return facts, Table("tables", f"{summary(of.standings())}", columns, tuple(rows))
